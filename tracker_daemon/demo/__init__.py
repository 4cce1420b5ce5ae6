"""`tracker-daemon demo`: chat traffic through a `Tracker`, then every row compared with an independent count."""

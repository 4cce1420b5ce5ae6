"""The replicated stream between trackers and the database: NATS JetStream."""

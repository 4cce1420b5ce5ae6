"""Write-behind conversation tracking for chat servers."""

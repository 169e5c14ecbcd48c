"""What of a run goes to the hub, and how it gets there."""

"""What a run can learn, one file a task."""

"""What runs only while weights change: data order, objective, optimizer, checkpoints, the loop."""

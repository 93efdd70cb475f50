"""What is no benchmark of the cell against its peers."""

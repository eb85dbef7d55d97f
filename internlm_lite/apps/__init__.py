"""What looks at a run or plans it; nothing that trains imports it."""

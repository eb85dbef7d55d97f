"""What a layout holds, sends and costs, before anything is started."""

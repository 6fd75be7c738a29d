"""What ships to the device: loader, session; numpy and the TVM runtime only."""

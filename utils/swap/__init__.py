"""Which weight lies where, and how frozen blocks stream to the device."""

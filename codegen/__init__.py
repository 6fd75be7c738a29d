"""FX to Relax, the kernel library of each ISA, schedules, weight packing, export."""

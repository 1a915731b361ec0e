"""What a run will need before it is started: operations, memory, time, cost. Arithmetic on recipes, without torch."""

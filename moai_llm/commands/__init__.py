"""One small file a verb: arguments in, rooms composed, results shown. No logic that a library user would miss."""

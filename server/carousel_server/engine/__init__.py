"""The engine: sessions, the scheduler, the arena and the runner. It knows nothing of gRPC; any process may host it."""

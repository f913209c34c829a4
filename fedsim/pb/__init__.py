"""Generated from proto/federation.proto; do not edit."""

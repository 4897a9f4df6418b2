"""Speed and memory as ratios to a named peer, measured side by side in one run; each module is a command."""

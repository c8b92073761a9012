"""What the commands of `eval` and `train` share: flags, back ends, hosts, run logs, texts, measuring. No other part of
the library imports this package."""

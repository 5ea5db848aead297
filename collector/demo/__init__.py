"""The embedded default: a small trained MoE and real text in 60 languages."""

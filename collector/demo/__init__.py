"""The embedded demo model, a small trained MoE, and the script that trained it on text in 60 languages."""

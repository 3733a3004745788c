"""Rewards that steer and judge policies, and what shows that a policy has collapsed."""

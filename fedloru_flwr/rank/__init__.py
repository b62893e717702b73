"""The rank story, measured: curvature of clients and server, how alike clients are, and what accumulation builds."""

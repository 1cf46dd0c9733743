"""Our stages and the peer on the same work, side by side. `make bench DATA=folder`."""

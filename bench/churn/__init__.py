"""The elastic drill: a fleet transfers without pause while its processes, links and directory are broken; every byte is checked."""

package ledger_test

import "syscall"

// mount makes a file system of the given size at dir.
func mount(dir, size string) error { return syscall.Mount("tmpfs", dir, "tmpfs", 0, "size="+size) }

// unmount does not wait for files that are still open.
func unmount(dir string) error { return syscall.Unmount(dir, syscall.MNT_DETACH) }

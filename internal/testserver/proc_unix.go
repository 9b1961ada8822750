//go:build unix && !linux

package testserver

import "syscall"

// attributes make a child run as uid and gid (-1: as us) in a process group of its own.
func attributes(uid, gid int) *syscall.SysProcAttr {
	a := &syscall.SysProcAttr{Setpgid: true}
	if uid >= 0 {
		a.Credential = &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}
	}
	return a
}

// stopped is not known outside Linux.
func stopped(int) bool { return true }

// descendants is not known outside Linux: Pause then stops new connections only.
func descendants(int) []int { return nil }

//go:build !linux

package ledger_test

import "errors"

func mount(string, string) error { return errors.New("implemented on Linux only") }

func unmount(string) error { return nil }

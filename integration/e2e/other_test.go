//go:build !linux

package e2e

import "testing"

func TestEndToEnd(t *testing.T) {
	t.Skip("needs Linux: the tests look into /proc and mount small file systems")
}

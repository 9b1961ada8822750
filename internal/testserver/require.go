// Package testserver starts and stops the real servers that tests and the demo need, each on private loopback ports with its data in
// a temporary folder.
package testserver

import (
	"fmt"
	"os"
)

// TB is the part of testing.TB that Need uses, so that this package does not import testing: the demo uses it too.
type TB interface {
	Helper()
	Skipf(format string, args ...any)
	Fatalf(format string, args ...any)
}

// RequireEnv set to 1 turns the skip of a missing server into a failure. The documented test command and CI set it.
const RequireEnv = "REKEY_REQUIRE_SERVERS"

// Need skips the test, naming the server, if that cannot be started here. With REKEY_REQUIRE_SERVERS=1 it fails instead. Call
// it before anything else. An unknown name is a failure always.
func Need(t TB, names ...string) {
	t.Helper()
	for _, name := range names {
		known, err := available(name)
		switch {
		case !known:
			t.Fatalf("testserver knows no server named %q", name)
		case err != nil && os.Getenv(RequireEnv) == "1":
			t.Fatalf("needs %s, and %s=1: %v", name, RequireEnv, err)
		case err != nil:
			t.Skipf("needs %s: %v", name, err)
		}
	}
}

// Missing explains why the named server cannot be started, nil if it can.
func Missing(name string) error {
	known, err := available(name)
	if !known {
		return fmt.Errorf("testserver knows no server named %q", name)
	}
	return err
}

// available is the list of servers that a suite may need.
func available(name string) (known bool, err error) {
	switch name {
	case "postgres":
		_, err := findPostgres()
		return true, err
	case "nats":
		_, err := findNATS()
		return true, err
	default:
		return false, nil
	}
}

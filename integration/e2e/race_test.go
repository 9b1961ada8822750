//go:build linux && race

package e2e

import "time"

// pace is the time between two logins of one client: with the race detector each costs much of a processor.
const pace = 300 * time.Millisecond

// raceFlags build the program as the test itself was built.
func raceFlags() []string { return []string{"-race"} }

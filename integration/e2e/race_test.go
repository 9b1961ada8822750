//go:build linux && race

package e2e

// raceFlags build the program as the test itself was built.
func raceFlags() []string { return []string{"-race"} }

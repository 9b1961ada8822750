//go:build linux && !race

package e2e

import "time"

const pace = 50 * time.Millisecond

func raceFlags() []string { return nil }

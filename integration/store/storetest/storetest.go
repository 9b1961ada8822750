// Package storetest is the suite that every secret store passes, and an in-memory store for the tests of its users.
//
// The checks are values, so that a store's own tests can show that each of them fails for a store that is broken in
// the way it is about.
package storetest

import (
	"context"
	"strings"
	"testing"
	"time"

	"github.com/rekeyhq/rekey/integration/store"
)

// Harness makes the stores under test.
type Harness struct {
	// New makes n handles on one fresh, empty state, as n processes would have. It closes them when t ends.
	New func(t testing.TB, n int) []store.Store
	// Points names the places in a changing call at which Dying's first handle can die. Empty skips the crash checks.
	Points []string
	// Dying makes two handles on one fresh, empty state. The first works until arm is called; then its next changing
	// call dies at the point, if it comes there, by a panic or an error, and leaves behind what a dead process would.
	// reopen makes a handle as a new process would.
	Dying func(t testing.TB, point string) (dying store.Store, arm func(), reopen func() store.Store)
	// MaxValue is the largest value in bytes that the store takes; 0 means 1 MiB.
	MaxValue int
	// Promotions is how many promotions the concurrent checks do; 0 means 40.
	Promotions int
}

// Check is one promise of the contract. Run returns how it was broken, or nil; t is only for making stores.
type Check struct {
	Name string
	// Crash marks the checks that need Points and Dying.
	Crash bool
	Run   func(ctx context.Context, t testing.TB, h Harness) error
}

// Checks lists every check.
func Checks() []Check {
	var all []Check
	for _, group := range [][]Check{stageChecks, promoteChecks, removeChecks, valueChecks, concurrentChecks, crashChecks} {
		all = append(all, group...)
	}
	return all
}

// Result says what Run did.
type Result struct {
	Ran     int
	Skipped []string // the names of the checks that the harness does not support
}

// Run runs every check as a subtest and logs how many were skipped, by name.
func Run(t *testing.T, h Harness) Result {
	t.Helper()
	var r Result
	for _, c := range Checks() {
		missing := h.lacks(c)
		if missing == "" {
			r.Ran++
		} else {
			r.Skipped = append(r.Skipped, c.Name)
		}
		t.Run(strings.ReplaceAll(c.Name, " ", "_"), func(t *testing.T) {
			if missing != "" {
				t.Skip(missing)
			}
			if err := Try(t, c, h); err != nil {
				t.Errorf("%s: %v", c.Name, err)
			}
		})
	}
	t.Logf("storetest: %d checks ran, %d skipped: [%s]", r.Ran, len(r.Skipped), strings.Join(r.Skipped, "; "))
	return r
}

// Try runs one check with a deadline, and returns how the store broke it.
func Try(t testing.TB, c Check, h Harness) error {
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	return c.Run(ctx, t, h)
}

// lacks says what the harness would need for c; nothing if it has it.
func (h Harness) lacks(c Check) string {
	if c.Crash && (h.Dying == nil || len(h.Points) == 0) {
		return c.Name + ": the harness cannot make a store die"
	}
	return ""
}

func (h Harness) promotions() int {
	if h.Promotions > 0 {
		return h.Promotions
	}
	return 40
}

func (h Harness) maxValue() int {
	if h.MaxValue > 0 {
		return h.MaxValue
	}
	return 1 << 20
}

func (h Harness) one(t testing.TB) store.Store { return h.New(t, 1)[0] }

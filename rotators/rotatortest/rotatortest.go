// Package rotatortest is the suite that every rotator passes, and two issuers that live in memory.
//
// A check is a value: a name, what it needs, and what it does. What a rotator cannot do it declares in its traits, and what
// a harness cannot arrange it leaves nil; the checks that this skips are named and counted.
package rotatortest

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/uuid"

	"github.com/rekeyhq/rekey/rotators"
)

// Harness makes the rotators that Run tries.
type Harness struct {
	// New makes an issuer without any version of ours. It is called once per check and may register cleanups.
	New func(tb testing.TB) Subject
	// Bubble runs each check in a testing/synctest bubble: for issuers without a network.
	Bubble bool
	// Timeout bounds one check; a minute if zero.
	Timeout time.Duration
}

// Subject is one rotator on one issuer, and what the harness can arrange there. Rotator and Credential are required.
type Subject struct {
	Rotator rotators.Rotator
	// Credential is the id that its ops carry.
	Credential string
	// Again is a second rotator on the same issuer, as another worker would have; Rotator itself if nil.
	Again rotators.Rotator
	// Open logs in as a consumer and keeps the session.
	Open func(ctx context.Context, m rotators.Material) (Session, error)
	// Break makes the issuer unreachable until restore is called.
	Break func() (restore func())
	// LoseReply lets the next change take effect and loses its answer.
	LoseReply func()
	// FailBefore loses the next change on its way to the issuer.
	FailBefore func()
	// Foreign makes a version that somebody else might have made, where the next generation would go if versions
	// have slots. works reports whether its secret still logs in.
	Foreign func() (id rotators.VersionID, works func() bool)
	// Written is all that the rotator has recorded or logged, and that the issuer has logged, to be searched for secrets.
	Written func() string
}

// Session is a consumer's open login.
type Session interface {
	// Alive asks the issuer, so that a session which was ended is noticed.
	Alive() bool
	Close()
}

// Check is one promise of the contract.
type Check struct {
	Name  string
	Needs []Need
	run   func(*trial)
}

// Need is a trait or an arrangement without which a check says nothing.
type Need struct {
	Name string
	met  func(Subject, rotators.Traits) bool
}

// The needs.
var (
	Composes   = Need{"an engine-chosen secret", func(_ Subject, t rotators.Traits) bool { return !t.Minted }}
	Mints      = Need{"a minted secret", func(_ Subject, t rotators.Traits) bool { return t.Minted }}
	Overlap    = Need{"two live versions", func(_ Subject, t rotators.Traits) bool { return t.MaxLive > 1 }}
	OneSlot    = Need{"a single slot", func(_ Subject, t rotators.Traits) bool { return t.MaxLive == 1 && !t.Minted }}
	Fenced     = Need{"a fence at the issuer", func(_ Subject, t rotators.Traits) bool { return !t.Unfenced }}
	Attributed = Need{"versions that show whose they are", func(_ Subject, t rotators.Traits) bool { return !t.Unfenced || t.Tagged }}
	Tags       = Need{"minted versions that show their op", func(_ Subject, t rotators.Traits) bool { return t.Minted && t.Tagged }}
	Counts     = Need{"a complete census", func(_ Subject, t rotators.Traits) bool { return t.Countable }}
	EndsThem   = Need{"Disable that ends sessions", func(s Subject, t rotators.Traits) bool { return t.Kills && s.Open != nil }}
	Breaks     = Need{"Subject.Break", func(s Subject, _ rotators.Traits) bool { return s.Break != nil }}
	Loses      = Need{"Subject.LoseReply", func(s Subject, _ rotators.Traits) bool { return s.LoseReply != nil }}
	Fails      = Need{"Subject.FailBefore", func(s Subject, _ rotators.Traits) bool { return s.FailBefore != nil }}
	Strangers  = Need{"Subject.Foreign", func(s Subject, _ rotators.Traits) bool { return s.Foreign != nil }}
	Checkable  = Need{"a Checker", func(s Subject, _ rotators.Traits) bool { _, ok := s.Rotator.(rotators.Checker); return ok }}
)

// Run tries every check as a subtest and prints how many of them the rotator's traits and the harness skipped.
func Run(t *testing.T, h Harness) {
	t.Helper()
	ran, skipped := 0, []string{}
	for _, c := range Checks() {
		t.Run(c.Name, func(t *testing.T) {
			h.in(t, func(t *testing.T) {
				missing, err := h.try(t, c)
				switch {
				case missing != "":
					skipped = append(skipped, c.Name)
					t.Skipf("needs %s", missing)
				case err != nil:
					ran++
					t.Error(err)
				default:
					ran++
				}
			})
		})
	}
	t.Logf("rotatortest: ran %d checks, skipped %d: %s", ran, len(skipped), strings.Join(skipped, ", "))
}

// Failures runs every check and returns what each failing one says, by name. It is how the suite itself is tested.
func Failures(t *testing.T, h Harness) map[string]error {
	t.Helper()
	failed := map[string]error{}
	for _, c := range Checks() {
		t.Run(c.Name, func(t *testing.T) {
			h.in(t, func(t *testing.T) {
				if _, err := h.try(t, c); err != nil {
					failed[c.Name] = err
				}
			})
		})
	}
	return failed
}

func (h Harness) in(t *testing.T, f func(*testing.T)) {
	if h.Bubble {
		synctest.Test(t, f)
		return
	}
	f(t)
}

// failure is what a trial panics with.
type failure struct{ message string }

// try runs one check on an issuer of its own. missing names the first unmet need.
func (h Harness) try(tb testing.TB, c Check) (missing string, err error) {
	timeout := h.Timeout
	if timeout == 0 {
		timeout = time.Minute
	}
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	s := h.New(tb)
	if s.Again == nil {
		s.Again = s.Rotator
	}
	traits := s.Rotator.Traits()
	for _, n := range c.Needs {
		if !n.met(s, traits) {
			return n.Name, nil
		}
	}
	x := &trial{Subject: s, ctx: ctx, traits: traits, incarnation: uuid.NewSHA1(uuid.Nil, []byte(c.Name))}
	defer func() {
		r := recover()
		if f, ok := r.(failure); ok {
			err = fmt.Errorf("%s: %s", c.Name, f.message)
		} else if r != nil {
			panic(r)
		}
		x.mu.Lock()
		sessions := slices.Clone(x.sessions)
		x.mu.Unlock()
		for _, open := range sessions {
			open.Close()
		}
	}()
	c.run(x)
	x.searchForSecrets()
	return "", nil
}

//go:build linux

package e2e

import (
	"math/rand/v2"
	"testing"
	"time"
)

// TestKillNine kills the only server at random moments during 50 rotations and starts it again each time.
func TestKillNine(t *testing.T) {
	t.Parallel()
	took(t)
	// Many side by side: what a dead server had in its hands rests for the time of a redelivery.
	const credentials, rotations = 17, 50 // rotations of all together, and at least one of each
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0))

	s := newSite(t, credentials)
	config := s.configure("one")
	p := s.run("one", "server", config)
	s.ready(p)
	s.begin(config)
	clients := s.consumeAt(1, 2*pace)

	kills := 0
	reached := func() bool { // also while the server is down: the store says it
		done := uint64(0)
		for _, id := range s.ids() {
			g, err := s.current(id)
			if err != nil || g < 2 {
				return false
			}
			done += g - 1
		}
		return done >= rotations
	}
	for deadline := time.Now().Add(4 * time.Minute); !reached(); kills++ {
		if time.Now().After(deadline) {
			t.Errorf("after %d kills there were not %d rotations, one of each credential at least", kills, rotations)
			break
		}
		s.ready(p)
		after := time.Duration(300+random.IntN(2000)) * time.Millisecond
		select {
		case <-time.After(after): // not to wait for something: the moment of death is what is random
			p.kill()
		case <-p.exited:
			t.Fatalf("the server ended by itself:\n%s", tail(p.text()))
		}
		p = s.run("one", "server", config)
	}
	s.ready(p)
	s.quiet(config)
	t.Logf("%d kills", kills)
	if kills < 10 {
		t.Errorf("%d kills prove little", kills)
	}
	clients.judge(t, 5*rotations)
	o := s.judge(s.ledger(config))
	s.owned()
	s.verified(config)
	pause, where := standstill(o.Entries)
	t.Logf("the longest standstill was %s: %s", pause.Round(time.Millisecond), where)
	workers := actors(o.Entries)
	t.Logf("%d server processes have worked", len(workers))
	s.searchForSecrets(config, clients.seen(), rotations/2, p)
}

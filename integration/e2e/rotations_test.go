//go:build linux

package e2e

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/rekeyhq/rekey/events"
	"github.com/rekeyhq/rekey/internal/api"
	"github.com/rekeyhq/rekey/internal/credential"
)

// begin declares the site's credentials and waits until each has its first version.
func (s *site) begin(config string) {
	s.t.Helper()
	s.must(config, "validate")
	s.apply(config)
	s.generation(config, 60*time.Second, 1)
}

// generation waits until consumers of every credential can read the given generation or a later one.
func (s *site) generation(config string, within time.Duration, least uint64) {
	s.t.Helper()
	eventually(s.t, within, fmt.Sprintf("generation %d of everything", least), func() (bool, string) {
		list, err := s.status(config)
		if err != nil {
			return false, err.Error()
		}
		var state []string
		done := len(list) == len(s.pairs)
		for _, c := range list {
			done = done && c.Current != nil && c.Current.Generation >= least
			text := fmt.Sprintf("%s generation %d is %s in %s", c.ID, c.Generation, c.State, c.Phase)
			if c.Failure != nil {
				text += ": " + c.Failure.Message
			}
			state = append(state, text)
		}
		return done, strings.Join(state, "; ")
	})
}

func TestScheduledRotations(t *testing.T) {
	t.Parallel()
	took(t)
	s := newSite(t, 1)
	config := s.configure("one")
	p := s.run("one", "server", config)
	s.ready(p)
	s.begin(config)
	l := s.ledger(config)
	clients := s.consume(8)

	const rotations = 20
	s.generation(config, 150*time.Second, rotations+1)
	s.quiet(config)
	clients.judge(t, rotations*10)
	o := s.judge(l)
	if n := s.owned(); n < rotations*8 {
		t.Errorf("the clients made %d tables; they should make 8 in each generation", n)
	}
	s.verified(config)

	id := s.pairs[0].id
	last := o.Records[0].Generation
	s.story(config, id, last)
	scheduled := 0
	for _, e := range o.Entries {
		if e.To == credential.Admitted && e.From == credential.Idle {
			scheduled++
		}
	}
	if scheduled < rotations {
		t.Errorf("%d rotations were admitted", scheduled)
	}
	s.searchForSecrets(config, clients.seen(), rotations, p)
}

// story checks that the events tell everything that happened to one credential, in order: each generation was published with a promise
// for the one before it, and the one before it was revoked later than that.
func (s *site) story(config string, id credential.ID, last uint64) {
	s.t.Helper()
	var rotated, revoked []uint64
	promised := map[uint64]time.Time{}
	out := s.must(config, "events", "--since", "all", "--output", "json", string(id))
	for line := range strings.Lines(out) {
		var e api.Event
		if err := json.Unmarshal([]byte(line), &e); err != nil {
			s.t.Fatalf("%v: %s", err, line)
		}
		g := e.Data.Generation
		switch e.Type {
		case events.Rotated:
			rotated = append(rotated, g)
			if g > 1 && e.Data.ValidUntil.Sub(e.Time) < overlapMin {
				s.t.Errorf("generation %d: the old one was promised for %s", g, e.Data.ValidUntil.Sub(e.Time))
			}
			if g > 1 && e.Data.Reason != "interval" {
				s.t.Errorf("generation %d: the reason is %q", g, e.Data.Reason)
			}
			promised[g-1] = e.Data.ValidUntil
		case events.Revoked:
			revoked = append(revoked, g)
			if e.Time.Before(promised[g]) {
				s.t.Errorf("generation %d was revoked %s before the time promised", g, promised[g].Sub(e.Time))
			}
		case events.OverlapEnding:
		default:
			s.t.Errorf("unexpected event %s of generation %d: %s", e.Type, g, e.Data.Message)
		}
	}
	var all []uint64
	for g := uint64(1); g <= last; g++ {
		all = append(all, g)
	}
	if !slices.Equal(rotated, all) || !slices.Equal(revoked, all[:last-1]) {
		s.t.Errorf("rotated %v, revoked %v; generation %d is current", rotated, revoked, last)
	}
}

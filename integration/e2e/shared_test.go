//go:build linux

package e2e

import (
	"maps"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/rekeyhq/rekey/internal/credential"
	"github.com/rekeyhq/rekey/internal/ledger"
)

// redelivery is how long a doorbell that a dead worker held is out of everybody's reach, with time to work on it then.
const redelivery = 30*time.Second + 10*time.Second

// TestTwoServersShareOneNATS runs two whole servers, and kills one of them in the middle.
func TestTwoServersShareOneNATS(t *testing.T) {
	t.Parallel()
	took(t)
	s := newSite(t, 6)
	s.nats = natsServer(t)
	configs := []string{s.configure("x"), s.configure("y")}
	servers := []*process{s.run("x", "server", configs[0]), s.run("y", "server", configs[1])}
	for _, p := range servers {
		s.ready(p)
	}
	s.begin(configs[0])
	l := s.ledger(configs[0])
	clients := s.consume(1)

	eventually(t, 60*time.Second, "both servers have rotated something", func() (bool, string) {
		n := s.steps(s.entries(l))
		return n[servers[0].pid()] > 10 && n[servers[1].pid()] > 10, ""
	})
	s.generation(configs[1], 60*time.Second, 3)

	// One dies, with work in its hands.
	eventually(t, 30*time.Second, "the first server is at work", func() (bool, string) {
		records, err := l.List(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		return slices.ContainsFunc(records, func(r credential.Record) bool {
			return r.Claim != nil && worker(r.Claim.Worker) == servers[0].pid()
		}), ""
	})
	servers[0].kill()
	died := time.Now()
	before := map[credential.ID]uint64{}
	for _, id := range s.ids() {
		g, err := s.current(id)
		if err != nil {
			t.Fatal(err)
		}
		before[id] = g
	}
	var slowest time.Duration
	waiting := maps.Clone(before)
	eventually(t, 2*redelivery, "every credential rotates on", func() (bool, string) {
		for id, g := range waiting {
			if now, err := s.current(id); err == nil && now > g {
				slowest = time.Since(died)
				delete(waiting, id)
			}
		}
		return len(waiting) == 0, strings.Join(slices.Collect(func(yield func(string) bool) {
			for id := range waiting {
				if !yield(string(id)) {
					return
				}
			}
		}), ", ")
	})
	t.Logf("the last credential rotated %s after the death", slowest.Round(time.Millisecond))
	if slowest > redelivery {
		t.Errorf("a death delayed a rotation by %s", slowest)
	}
	s.quiet(configs[1])
	clients.judge(t, 100)
	o := s.judge(l)
	pause, where := standstill(o.Entries)
	t.Logf("the longest standstill was %s: %s; steps by process: %v", pause.Round(time.Millisecond), where, s.steps(o.Entries))
	s.owned()
	s.verified(configs[1])
	s.searchForSecrets(configs[1], clients.seen(), 18, servers...)
}

// entries is the whole audit stream.
func (s *site) entries(l *ledger.Ledger) []credential.Entry {
	s.t.Helper()
	var all []credential.Entry
	err := l.Audit(s.t.Context(), ledger.Query{}, func(e credential.Entry, _ uint64) error {
		all = append(all, e)
		return nil
	})
	if err != nil {
		s.t.Fatal(err)
	}
	return all
}

// steps counts what each process's worker committed.
func (s *site) steps(entries []credential.Entry) map[int]int {
	n := map[int]int{}
	for _, e := range entries {
		if pid := worker(e.Actor); pid != 0 {
			n[pid]++
		}
	}
	return n
}

// worker is the process behind a worker's name, host/pid/run#pass; 0 if it is none.
func worker(name string) int {
	parts := strings.Split(name, "/")
	if len(parts) != 3 || !strings.Contains(parts[2], "#") {
		return 0
	}
	pid, err := strconv.Atoi(parts[1])
	if err != nil {
		return 0
	}
	return pid
}

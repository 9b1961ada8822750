//go:build linux

package e2e

import (
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/rekeyhq/rekey/internal/ledger"
)

// TestGracefulStop ends the server with SIGTERM while it rotates, looks at what it left, and starts it again.
func TestGracefulStop(t *testing.T) {
	t.Parallel()
	took(t)
	s := newSite(t, 4)
	config := s.configure("one")
	p := s.run("one", "server", config)
	s.ready(p)
	s.begin(config)
	clients := s.consume(1)

	for round := range 4 {
		// In the middle of it: somebody's step is claimed.
		eventually(t, 30*time.Second, "a step is under way", func() (bool, string) {
			list, err := s.status(config)
			if err != nil {
				return false, err.Error()
			}
			busy := 0
			for _, c := range list {
				if c.Worker != "" {
					busy++
				}
			}
			return busy > 0, ""
		})
		began := time.Now()
		p.signal(syscall.SIGTERM)
		if code := p.end(stepDeadline + 15*time.Second); code != 0 {
			t.Fatalf("exit code %d:\n%s", code, tail(p.text()))
		}
		t.Logf("round %d: ended %s after the signal", round, time.Since(began).Round(time.Millisecond))

		// What it left is read from its files, by nobody but us.
		node, err := ledger.StartEmbedded(ledger.EmbeddedConfig{DataDir: s.dataDir(config)})
		if err != nil {
			t.Fatal(err)
		}
		nc, err := node.Connect()
		if err != nil {
			t.Fatal(err)
		}
		l, err := ledger.Open(t.Context(), ledger.Config{Conn: nc})
		if err != nil {
			t.Fatal(err)
		}
		records, err := l.List(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		for _, r := range records {
			if r.Claim != nil {
				t.Errorf("%s is still claimed by %s for %s", r.ID, r.Claim.Worker, r.Claim.Phase)
			}
			if r.Failure != nil {
				t.Errorf("%s: the stop made a step fail: %s", r.ID, r.Failure.Message)
			}
		}
		l.Close()
		nc.Close()
		node.Shutdown()
		if left, _ := filepath.Glob(s.path("*.sock")); len(left) > 0 {
			t.Errorf("the socket is left behind: %v", left)
		}

		g := map[string]uint64{}
		for _, id := range s.ids() {
			if g[string(id)], err = s.current(id); err != nil {
				t.Fatal(err)
			}
		}
		p = s.run("one", "server", config)
		s.ready(p)
		back := time.Now()
		eventually(t, 60*time.Second, "every credential rotates on", func() (bool, string) {
			for _, id := range s.ids() {
				if now, err := s.current(id); err != nil || now <= g[string(id)] {
					return false, string(id)
				}
			}
			return true, ""
		})
		t.Logf("round %d: everything rotated within %s of the next start", round, time.Since(back).Round(time.Millisecond))
	}
	s.quiet(config)
	clients.judge(t, 100)
	s.judge(s.ledger(config))
	s.verified(config)
}

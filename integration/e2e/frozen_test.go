//go:build linux

package e2e

import (
	"bytes"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/rekeyhq/rekey/internal/credential"
	"github.com/rekeyhq/rekey/internal/ledger"
	"github.com/rekeyhq/rekey/internal/testserver"
)

// frozen is one server and two workers on an external NATS, with a relay before the database on which a worker can be stopped just
// before it says a certain thing.
type frozen struct {
	*site
	relay   *testserver.Proxy
	config  string // the server's
	server  *process
	workers []*process
	ledger  *ledger.Ledger
}

func newFrozen(t *testing.T) *frozen {
	t.Helper()
	s := newSite(t, 1)
	s.nats = natsServer(t)
	relay, err := testserver.NewProxy(s.pg.Host, s.pg.Port)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(relay.Close)
	s.port = relay.Port
	f := &frozen{site: s, relay: relay, config: s.configure("server")}
	f.server = s.run("server", "server", f.config)
	s.ready(f.server)
	for _, name := range []string{"a", "b"} {
		f.workers = append(f.workers, s.run(name, "worker", s.configure(name)))
	}
	s.begin(f.config)
	f.ledger = s.ledger(f.config)
	return f
}

// caught is a worker that was stopped with a request on its way.
type caught struct {
	worker  *process
	record  credential.Record
	release chan struct{}
	logged  int // how much it had written
}

// freeze stops the first of the two workers whose request match accepts, before the database hears of it.
func (f *frozen) freeze(match func(request string, r credential.Record) bool) caught {
	f.t.Helper()
	var once sync.Mutex
	done := false
	got := make(chan caught, 1)
	id := f.pairs[0].id
	f.relay.Watch(func(client net.Addr, request []byte) <-chan struct{} {
		once.Lock()
		defer once.Unlock()
		if done || !bytes.Contains(request, []byte("ROLE")) && !bytes.Contains(request, []byte("BEGIN")) {
			return nil
		}
		r, _, err := f.ledger.Get(f.t.Context(), id) // the intent was committed before
		if err != nil || !match(string(request), r) {
			return nil
		}
		for _, w := range f.workers {
			if !owns(w.pid(), client) {
				continue
			}
			done = true
			w.signal(syscall.SIGSTOP)
			c := caught{worker: w, record: r, release: make(chan struct{}), logged: len(w.text())}
			got <- c
			return c.release
		}
		return nil // the server's own worker: let it pass, the next may be one of ours
	})
	select {
	case c := <-got:
		f.t.Logf("stopped worker %s in %s of generation %d", c.worker.name, c.record.Phase, c.record.Generation)
		return c
	case <-time.After(90 * time.Second):
		f.t.Fatal("no worker came by")
		return caught{}
	}
}

// thaw lets the request go and the worker go on, and waits until that has said what became of its step.
func (f *frozen) thaw(c caught) {
	f.t.Helper()
	close(c.release)
	c.worker.signal(syscall.SIGCONT)
	want := fmt.Sprintf("msg=step credential=%s phase=%s generation=%d ", c.record.ID, c.record.Phase, c.record.Generation)
	var line string
	eventually(f.t, 30*time.Second, "the worker that was stopped ends its step", func() (bool, string) {
		text := c.worker.text()[c.logged:]
		i := strings.Index(text, want)
		if i < 0 || !strings.Contains(text[i:], "\n") {
			return false, tail(text)
		}
		line, _, _ = strings.Cut(text[i:], "\n")
		return true, ""
	})
	f.t.Logf("it woke up: %s", line)
	if !strings.Contains(line, "result=failed") {
		f.t.Errorf("a worker that slept through its deadline says that it succeeded: %s", line)
	}
}

// owns reports whether a process has the connection that comes from this loopback address.
func owns(pid int, client net.Addr) bool {
	a, ok := client.(*net.TCPAddr)
	if !ok {
		return false
	}
	b, err := os.ReadFile("/proc/net/tcp")
	if err != nil {
		return false
	}
	inode := ""
	local := fmt.Sprintf("0100007F:%04X", a.Port)
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); len(f) > 9 && f[1] == local && f[3] == "01" { // established
			inode = f[9]
		}
	}
	links, _ := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid))
	for _, link := range links {
		if to, err := os.Readlink(link); err == nil && inode != "" && to == "socket:["+inode+"]" {
			return true
		}
	}
	return false
}

func claimed(r credential.Record, p credential.Phase) bool {
	return r.Phase == p && r.Claim != nil && r.Claim.Phase == p
}

func TestFrozenWorker(t *testing.T) {
	for name, match := range map[string]func(string, credential.Record) bool{
		"BeforeTheTransaction": func(request string, r credential.Record) bool {
			return claimed(r, credential.Disabling) && strings.Contains(request, "BEGIN")
		},
		"BeforeTheStatement": func(request string, r credential.Record) bool {
			return claimed(r, credential.Disabling) && strings.Contains(request, " NOLOGIN;")
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			took(t)
			f := newFrozen(t)
			clients := f.consume(2)
			c := f.freeze(match)
			eventually(t, 90*time.Second, "the others carry on for two generations", func() (bool, string) {
				g, err := f.current(f.pairs[0].id)
				return g >= c.record.Generation+2, fmt.Sprintf("generation %d, %v", g, err)
			})
			f.thaw(c)
			g, err := f.current(f.pairs[0].id)
			if err != nil {
				t.Fatal(err)
			}
			f.generation(f.config, 60*time.Second, g+1)
			f.quiet(f.config)
			clients.judge(t, 50)
			f.judge(f.ledger)
			f.verified(f.config)
		})
	}
	t.Run("AcrossAKill", func(t *testing.T) {
		t.Parallel()
		took(t)
		f := newFrozen(t)
		id := string(f.pairs[0].id)
		c := f.freeze(func(request string, r credential.Record) bool {
			return claimed(r, credential.Applying) && strings.Contains(request, "LOGIN INHERIT PASSWORD")
		})
		t.Log(strings.TrimSpace(f.must(f.config, "kill", id, "--yes", "--reason", "the end-to-end test", "--wait", "--timeout", "90s")))
		dead := func(when string) {
			t.Helper()
			if l := f.logins(); len(l) > 0 {
				t.Errorf("%s %v may log in", when, l)
			}
		}
		dead("after the kill")
		f.thaw(c)
		dead("after the worker woke up")
		eventually(t, 60*time.Second, "the second sweep", func() (bool, string) {
			dead("before the second sweep")
			r, _, err := f.ledger.Get(t.Context(), f.pairs[0].id)
			if err != nil {
				t.Fatal(err)
			}
			return r.Swept && r.Phase == credential.Suspended && r.Claim == nil, string(r.Phase)
		})
		f.judge(f.ledger)
		dead("after the second sweep")

		f.every = "0s"
		f.again(f.config)
		f.apply(f.config)
		f.restore(f.config, id)
		f.generation(f.config, 60*time.Second, c.record.Generation+1)
		f.settled(f.config)
		f.judge(f.ledger)
		f.verified(f.config)
	})
}

//go:build linux

package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/rekeyhq/rekey/internal/api"
)

// TestAnonymousNATSRefused knocks at the embedded server's port without an identity, and with a wrong one.
func TestAnonymousNATSRefused(t *testing.T) {
	t.Parallel()
	took(t)
	s := newSite(t, 1)
	config := s.configure("one")
	p := s.run("one", "server", config)
	s.ready(p)
	url := fmt.Sprintf("nats://127.0.0.1:%d", s.natsPort(config))

	other := newSite(t, 1)
	theirs := other.configure("other")
	other.ready(other.run("other", "server", theirs))

	for name, opts := range map[string][]nats.Option{
		"anonymous":             nil,
		"user and password":     {nats.UserInfo("rekey", "rekey")},
		"a token":               {nats.Token("rekey")},
		"another site's engine": {nats.UserCredentials(filepath.Join(other.dataDir(theirs), "nats", "engine.creds"))},
	} {
		nc, err := nats.Connect(url, append(opts, nats.Timeout(10*time.Second))...)
		if err == nil {
			nc.Close()
			t.Errorf("%s: was let in", name)
		} else if !strings.Contains(strings.ToLower(err.Error()), "authoriz") {
			t.Errorf("%s: refused for another reason: %v", name, err)
		}
	}
	// The engine's own identity is the proof that the port works; nobody else may read it.
	creds := filepath.Join(s.dataDir(config), "nats", "engine.creds")
	nc, err := nats.Connect(url, nats.UserCredentials(creds))
	if err != nil {
		t.Fatalf("the engine's identity: %v", err)
	}
	nc.Close()
	for _, path := range []string{creds, filepath.Join(s.dataDir(config), api.AdminTokenFile), filepath.Join(s.dataDir(config), "nats"), s.path("secrets"), s.path("secrets.key"), s.path("one.sock")} {
		if info, err := os.Stat(path); err != nil || info.Mode().Perm()&0o077 != 0 {
			t.Errorf("%s: others may use it: %v, %v", path, info.Mode(), err)
		}
	}
}

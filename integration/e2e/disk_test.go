//go:build linux

package e2e

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// mount makes a small file system for the data directory; where that is not permitted the test is skipped by name.
func (s *site) mount(dir, size string) {
	s.t.Helper()
	if err := os.Mkdir(dir, 0o700); err != nil {
		s.t.Fatal(err)
	}
	if err := syscall.Mount("tmpfs", dir, "tmpfs", 0, "mode=0700,size="+size); err != nil {
		s.t.Skipf("needs to mount a small file system: %v", err)
	}
	s.t.Cleanup(func() {
		if err := syscall.Unmount(dir, syscall.MNT_DETACH); err != nil {
			s.t.Error(err)
		}
	})
}

// fill leaves no space; the file is what has to go again.
func (s *site) fill(path string) {
	s.t.Helper()
	f, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		s.t.Fatal(err)
	}
	defer f.Close()
	for _, size := range []int{1 << 20, 64 << 10, 4 << 10, 512} {
		for err = nil; err == nil; {
			_, err = f.Write(make([]byte, size))
		}
		if !errors.Is(err, syscall.ENOSPC) {
			s.t.Fatal(err)
		}
	}
}

// TestDataDirectoryFull fills the ledger's disk before a start, and below a server that rotates.
func TestDataDirectoryFull(t *testing.T) {
	t.Parallel()
	took(t)
	s := newSite(t, 2)
	config := s.configure("one")
	s.mount(s.dataDir(config), "24m")
	ballast := filepath.Join(s.dataDir(config), "ballast")
	s.fill(ballast)
	s.wants("start on a full disk", s.cli(config, "server"), 1, "no space left on device", s.dataDir(config))
	if err := os.Remove(ballast); err != nil {
		t.Fatal(err)
	}
	if roles := s.logins(); len(roles) > 0 {
		t.Errorf("roles %v were made", roles)
	}

	p := s.run("one", "server", config)
	s.ready(p)
	s.begin(config)
	clients := s.consume(2)
	s.generation(config, 60*time.Second, 2)
	s.fill(ballast)
	full := time.Now()
	if code := p.end(90 * time.Second); code != 1 { // whoever supervises it has to notice
		t.Errorf("the server ended with code %d", code)
	}
	said := p.text()[max(0, len(p.text())-1500):]
	t.Logf("ended after %s: %s", time.Since(full).Round(time.Millisecond), said[strings.LastIndex(strings.TrimSpace(said), "\n")+1:])
	if !strings.Contains(said, "rekey: embedded NATS: ") || !strings.Contains(said, "no space left on device") || !strings.Contains(said, "make space") {
		t.Errorf("the last words do not say why:\n%s", said)
	}
	// Consumers notice nothing, for longer than an overlap and an interval.
	logins := clients.logins.Load()
	eventually(t, 30*time.Second, "clients go on", func() (bool, string) { return clients.logins.Load() > logins+25, "" })
	if err := os.Remove(ballast); err != nil {
		t.Fatal(err)
	}
	g, err := s.current(s.pairs[0].id)
	if err != nil {
		t.Fatal(err)
	}
	p = s.run("one", "server", config)
	s.ready(p)
	s.generation(config, 90*time.Second, g+2)
	s.quiet(config)
	clients.judge(t, 50)
	s.judge(s.ledger(config))
	s.verified(config)
}

// TestStoreThatCannotBeWritten starts with a store that is not safe or not writable, and takes the right to write away from a server
// that rotates. It runs as a user that permissions hold for.
func TestStoreThatCannotBeWritten(t *testing.T) {
	t.Parallel()
	took(t)
	s := newSite(t, 1)
	s.unprivileged()
	config := s.configure("one")
	secrets := s.path("secrets")
	mode := func(m os.FileMode) {
		t.Helper()
		if err := os.Chmod(secrets, m); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Mkdir(secrets, 0o755); err != nil {
		t.Fatal(err)
	}
	s.own()
	mode(0o755)
	s.wants("a directory that others may enter", s.cli(config, "server"), 1, secrets, "chmod 700")
	mode(0o500)
	s.wants("a directory that cannot be written", s.cli(config, "server"), 1, secrets, "permission denied")
	mode(0o700)
	if roles := s.logins(); len(roles) > 0 {
		t.Errorf("roles %v were made", roles)
	}

	p := s.run("one", "server", config)
	s.ready(p)
	s.begin(config)
	clients := s.consume(2)
	s.generation(config, 60*time.Second, 2)
	mode(0o500)
	id := string(s.pairs[0].id)
	eventually(t, 90*time.Second, "status says what is wrong", func() (bool, string) {
		r := s.cli(config, "status", id)
		return r.code == 0 && strings.Contains(r.out, "permission denied"), r.all()
	})
	logins := clients.logins.Load()
	eventually(t, 30*time.Second, "clients go on", func() (bool, string) { return clients.logins.Load() > logins+25, "" })
	mode(0o700)
	g, err := s.current(s.pairs[0].id)
	if err != nil {
		t.Fatal(err)
	}
	s.must(config, "resume", id) // it may be parked, or wait for its next try
	s.generation(config, 90*time.Second, g+1)
	s.quiet(config)
	clients.judge(t, 25)
	s.judge(s.ledger(config))
	s.verified(config)
}

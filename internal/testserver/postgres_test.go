//go:build unix

package testserver_test

import (
	"fmt"
	"net"
	"os"
	"strconv"
	"strings"
	"testing"

	"github.com/rekeyhq/rekey/internal/testserver"
)

// TestPostgresLifecycle goes through every way to end the server and to start it again.
func TestPostgresLifecycle(t *testing.T) {
	testserver.Need(t, "postgres")
	p, err := testserver.StartPostgres(testserver.PostgresConfig{TLS: true})
	if err != nil {
		t.Fatal(err)
	}
	defer p.Stop()
	listens := func() bool {
		c, err := net.Dial("tcp", net.JoinHostPort(p.Host, strconv.Itoa(p.Port)))
		if err == nil {
			c.Close()
		}
		return err == nil
	}
	if !listens() {
		t.Fatal("a started server does not listen")
	}
	p.Pause()
	p.Resume()
	p.Kill()
	if p.PID() != 0 || listens() {
		t.Fatal("a killed server is still there")
	}
	if err := p.Start(); err != nil {
		t.Fatalf("start after kill: %v", err)
	}
	if err := p.Halt(); err != nil || listens() {
		t.Fatalf("halt: %v", err)
	}
	if err := p.Start(); err != nil {
		t.Fatalf("start after halt: %v", err)
	}
	if log, err := p.Log(); err != nil || !strings.Contains(log, "ready to accept connections") {
		t.Fatalf("log: %v: %s", err, log)
	}
	dir := p.DataDir()
	if err := p.Stop(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(dir); !os.IsNotExist(err) {
		t.Fatalf("data is left behind: %v", err)
	}
	if err := p.Stop(); err != nil {
		t.Fatalf("stop twice: %v", err)
	}
}

func TestPostgresThatCannotStartSaysWhy(t *testing.T) {
	testserver.Need(t, "postgres")
	_, err := testserver.StartPostgres(testserver.PostgresConfig{Settings: map[string]string{"no_such_setting": "x"}})
	if err == nil || !strings.Contains(err.Error(), "no_such_setting") {
		t.Fatalf("want an error that names the setting, got %v", err)
	}
}

// recorder is a test that notes how Need ended it.
type recorder struct{ skipped, failed string }

func (r *recorder) Helper()                   {}
func (r *recorder) Skipf(f string, a ...any)  { r.skipped = fmt.Sprintf(f, a...) }
func (r *recorder) Fatalf(f string, a ...any) { r.failed = fmt.Sprintf(f, a...) }

func TestNeedNamesAnUnknownServer(t *testing.T) {
	var r recorder
	testserver.Need(&r, "oracle")
	if !strings.Contains(r.failed, "oracle") {
		t.Fatalf("got %+v", r)
	}
}

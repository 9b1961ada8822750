//go:build linux

package e2e

import (
	"context"
	"flag"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/rekeyhq/rekey/internal/testserver"
)

// shared is what the tests have in common: the program, built once, and one PostgreSQL. Each test uses roles of its own.
var shared = struct {
	sync.Mutex
	dir string
	bin string
	pg  *testserver.Postgres
}{}

func TestMain(m *testing.M) {
	dir, err := os.MkdirTemp("", "e2e")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	shared.dir = dir
	flag.Parse()
	if f := flag.Lookup("test.parallel"); f.Value.String() == f.DefValue { // they wait more than they compute
		_ = f.Value.Set("4")
	}
	began := time.Now()
	code := m.Run()
	fmt.Printf("end-to-end tests: %s\n", time.Since(began).Round(100*time.Millisecond))
	if shared.pg != nil {
		_ = shared.pg.Stop()
	}
	_ = os.RemoveAll(dir)
	os.Exit(code)
}

// program builds rekey at the first use, with the race detector if the test has it.
func program(t *testing.T) string {
	t.Helper()
	shared.Lock()
	defer shared.Unlock()
	if shared.bin == "" {
		bin := filepath.Join(shared.dir, "rekey")
		cmd := exec.Command("go", append(append([]string{"build"}, raceFlags()...), "-o", bin, "github.com/rekeyhq/rekey/cmd/rekey")...)
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("build rekey: %v\n%s", err, out)
		}
		shared.bin = bin
	}
	return shared.bin
}

// postgresServer is the shared server, started at the first use.
func postgresServer(t *testing.T) *testserver.Postgres {
	t.Helper()
	testserver.Need(t, "postgres")
	shared.Lock()
	defer shared.Unlock()
	if shared.pg == nil {
		p, err := testserver.StartPostgres(testserver.PostgresConfig{Settings: map[string]string{"max_connections": "300"}})
		if err != nil {
			t.Fatal(err)
		}
		shared.pg = p
	}
	return shared.pg
}

// natsServer is an external server of this test's own.
func natsServer(t *testing.T) *testserver.NATS {
	t.Helper()
	testserver.Need(t, "nats")
	n, err := testserver.StartNATS(testserver.NATSConfig{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := n.Stop(); err != nil {
			t.Error(err)
		}
	})
	return n
}

// freePort is below the range from which the kernel takes ports for outgoing connections, so that it is still free when a server
// that was killed starts again.
func freePort(t *testing.T) int {
	t.Helper()
	for range 200 {
		port := 12000 + rand.IntN(18000)
		l, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", port))
		if err == nil {
			_ = l.Close()
			return port
		}
	}
	t.Fatal("no free port")
	return 0
}

// eventually polls until ok says that it is so; otherwise the test ends with what ok said last.
func eventually(t *testing.T, within time.Duration, what string, ok func() (bool, string)) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), within)
	defer cancel()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		done, state := ok()
		if done {
			return
		}
		select {
		case <-ctx.Done():
			t.Fatalf("%s: not within %s: %s", what, within, state)
		case <-tick.C:
		}
	}
}

// took logs how long a test needed.
func took(t *testing.T) {
	began := time.Now()
	t.Cleanup(func() { t.Logf("took %s", time.Since(began).Round(100*time.Millisecond)) })
}

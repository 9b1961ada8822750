package ledger_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/rekeyhq/rekey/events"
	"github.com/rekeyhq/rekey/internal/credential"
	"github.com/rekeyhq/rekey/internal/ledger"
	"github.com/rekeyhq/rekey/internal/ledger/ledgertest"
)

// childEnv makes the test program a process that commits until it is killed.
const childEnv = "REKEY_LEDGER_CHILD_DIR"

func TestMain(m *testing.M) {
	if dir := os.Getenv(childEnv); dir != "" {
		if err := commitForever(dir); err != nil {
			fmt.Println("error", err)
			os.Exit(1)
		}
	}
	os.Exit(m.Run())
}

const crashWriters = 12

// commitForever changes a few credentials as fast as it can and writes a line for each commit that was acknowledged. It
// ends with its standard input, if it is not killed before.
func commitForever(dir string) error {
	go func() {
		_, _ = bufio.NewReader(os.Stdin).ReadByte()
		os.Exit(0)
	}()
	e, err := ledger.StartEmbedded(ledger.EmbeddedConfig{DataDir: dir})
	if err != nil {
		return err
	}
	nc, err := e.Connect()
	if err != nil {
		return err
	}
	ctx := context.Background()
	l, err := ledger.Open(ctx, ledger.Config{Conn: nc})
	if err != nil {
		return err
	}
	fmt.Println("open", l.Incarnation())
	var out sync.Mutex
	failed := make(chan error, crashWriters)
	for i := range crashWriters {
		go func() {
			id := credential.ID(fmt.Sprintf("pay/c%d", i))
			for {
				r, seq, err := l.Get(ctx, id)
				switch {
				case errors.Is(err, credential.ErrNotFound):
					r = ledgertest.New(l.Incarnation(), id)
				case err != nil:
					failed <- err
					return
				case r.Rev%5 == 0:
					r = ledgertest.Next(r, time.Time{}) // cancels the schedule
				default:
					r = ledgertest.Next(r, time.Now().Add(time.Hour), credential.NoticeRotated, credential.NoticeOverdue)
				}
				if seq, err = l.Commit(ctx, r, seq); err != nil {
					failed <- err
					return
				}
				out.Lock()
				fmt.Println("committed", id, r.Rev, seq)
				out.Unlock()
			}
		}()
	}
	return <-failed
}

// kill -9 in the middle of everything, again and again: what was acknowledged is there with its event, audit entry and
// schedule; what was not is there whole or not at all.
func TestKillNine(t *testing.T) {
	t.Parallel() // it mostly waits
	dir := t.TempDir()
	acked := map[credential.ID]uint64{}
	incarnation := ""
	rounds := 8
	if testing.Short() {
		rounds = 3
	}
	for round := range rounds {
		run := func() {
			cmd := exec.Command(os.Args[0], "-test.run=^$")
			cmd.Env = append(os.Environ(), childEnv+"="+dir)
			if _, err := cmd.StdinPipe(); err != nil { // it ends with us
				t.Fatal(err)
			}
			stdout, err := cmd.StdoutPipe()
			if err != nil {
				t.Fatal(err)
			}
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			defer func() { _ = cmd.Wait() }()
			defer func() { _ = cmd.Process.Kill() }()
			commits := 0
			// The kill comes after a number of commits, at whatever point the others are.
			for lines := bufio.NewScanner(stdout); lines.Scan(); {
				f := strings.Fields(lines.Text())
				switch {
				case len(f) == 2 && f[0] == "open":
					if incarnation != "" && f[1] != incarnation {
						t.Fatalf("incarnation %s, was %s", f[1], incarnation)
					}
					incarnation = f[1]
				case len(f) == 4 && f[0] == "committed":
					var rev uint64
					if _, err := fmt.Sscan(f[2], &rev); err != nil {
						t.Fatal(err)
					}
					acked[credential.ID(f[1])] = max(rev, acked[credential.ID(f[1])])
					if commits++; commits == 40+37*round {
						_ = cmd.Process.Kill()
					}
				default:
					t.Fatalf("the child says %q", lines.Text())
				}
			}
		}
		run()

		e := startEmbedded(t, dir)
		nc := connect(t, e)
		l := open(t, ledger.Config{Conn: nc})
		if l.Incarnation().String() != incarnation {
			t.Fatalf("incarnation %s, was %s", l.Incarnation(), incarnation)
		}
		records := whole(t, l)
		schedules, err := l.Schedules(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		final := map[credential.ID]uint64{}
		for _, r := range records {
			final[r.ID] = r.Rev
			// A cancelled schedule may come back, because the server does not sync a purge: it rings for nothing.
			if !r.Due.IsZero() && schedules[r.ID] != r.Rev {
				t.Errorf("round %d: %s rev %d has the schedule of rev %d", round, r.ID, r.Rev, schedules[r.ID])
			}
		}
		for id, rev := range acked {
			if final[id] < rev {
				t.Errorf("round %d: %s rev %d was acknowledged, the ledger has %d", round, id, rev, final[id])
			}
		}
		l.Close()
		nc.Close()
		e.Shutdown()
	}
	t.Logf("%d credentials, revs %v", len(acked), acked)
}

// A full disk: commits fail, loudly, and nothing that was acknowledged is lost. With space again, a restart goes on.
func TestDiskFull(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "disk")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := mount(dir, "16m"); err != nil {
		t.Skipf("needs to mount a small file system: %v", err)
	}
	t.Cleanup(func() {
		if err := unmount(dir); err != nil {
			t.Error(err)
		}
	})
	data := filepath.Join(dir, "data")
	e := startEmbedded(t, data)
	nc := connect(t, e)
	l := open(t, ledger.Config{Conn: nc, Timeout: time.Second})
	ctx := t.Context()
	ballast := filepath.Join(dir, "ballast")
	fill(t, ballast)
	info, err := os.Stat(ballast)
	if err == nil {
		err = os.Truncate(ballast, info.Size()-1<<20) // room for some commits
	}
	if err != nil {
		t.Fatal(err)
	}

	acked := map[credential.ID]uint64{}
	var failure error
	for i := 0; failure == nil; i++ {
		r := ledgertest.New(l.Incarnation(), credential.ID(fmt.Sprintf("pay/c%d", i)))
		r.Residue = strings.Repeat("x", 8<<10)
		if _, failure = l.Commit(ctx, r, 0); failure == nil {
			acked[r.ID] = r.Rev
		}
		if i > 5000 {
			t.Fatal("the disk does not fill")
		}
	}
	if t.Logf("%d commits, then: %v", len(acked), failure); len(acked) == 0 {
		t.Fatal("there was no room for a single commit")
	}
	if errors.Is(failure, credential.ErrStale) {
		t.Errorf("a full disk looks like a stale commit: %v", failure)
	}
	if err := l.Check(ctx); err == nil {
		t.Error("Check does not notice")
	} else {
		t.Logf("Check: %v; Err: %v", err, e.Err())
	}
	if err := e.Disk(); !errors.Is(err, syscall.ENOSPC) || !strings.Contains(err.Error(), data) {
		t.Errorf("Disk says %v", err)
	}
	l.Close()
	nc.Close()
	e.Shutdown()

	// Still full: the start says so.
	fill(t, ballast)
	if e, err := ledger.StartEmbedded(ledger.EmbeddedConfig{DataDir: data}); err == nil {
		e.Shutdown()
		t.Error("it started on a full disk")
	} else if !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("start on a full disk: %v", err)
	}
	if err := os.Remove(ballast); err != nil {
		t.Fatal(err)
	}
	e = startEmbedded(t, data)
	l = open(t, ledger.Config{Conn: connect(t, e)})
	final := map[credential.ID]uint64{}
	for _, r := range whole(t, l) {
		final[r.ID] = r.Rev
	}
	for id, rev := range acked {
		if final[id] != rev {
			t.Errorf("%s rev %d was acknowledged, the ledger has %d", id, rev, final[id])
		}
	}
	if _, err := l.Commit(ctx, ledgertest.New(l.Incarnation(), "pay/after"), 0); err != nil {
		t.Errorf("after there is space again: %v", err)
	}
	if err := errors.Join(e.Err(), l.Check(ctx), l.Events(ctx, ledger.Query{}, func(events.Event) error { return nil })); err != nil {
		t.Error(err)
	}
	l.Close()
	e.Shutdown()
}

// fill writes until there is no space left.
func fill(t *testing.T, path string) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for _, size := range []int{1 << 20, 64 << 10, 4 << 10, 512} {
		for err == nil {
			_, err = f.Write(make([]byte, size))
		}
		if !errors.Is(err, syscall.ENOSPC) {
			t.Fatal(err)
		}
		err = nil
	}
}

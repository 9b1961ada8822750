package file

import (
	"context"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/google/uuid"

	"github.com/rekeyhq/rekey/integration/store"
	"github.com/rekeyhq/rekey/integration/store/storetest"
	"github.com/rekeyhq/rekey/rotators"
)

const id = "orders/db"

var incarnation = uuid.MustParse("a8e2f0d4-5f8d-4a0e-9a55-6f4a1b7c3d21")

func keyOf(g uint64) store.Key {
	return store.Key{Credential: id, Generation: g, OpID: rotators.NewOpID(incarnation, id, g), Version: "role_a"}
}

func secretOf(g uint64) store.Secret {
	return store.Secret{Key: keyOf(g), Material: rotators.Text(map[string]string{"password": canary(g)})}
}

func canary(g uint64) string { return strings.Repeat("hunter", int(g)) + "-canary" }

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func newStore(t testing.TB, cfg Config) *Store {
	t.Helper()
	s, err := New(cfg)
	must(t, err)
	t.Cleanup(func() { _ = s.Close() })
	return s
}

// fill makes generation 2 current, 1 previous and 3 pending.
func fill(t testing.TB, s store.Store) {
	t.Helper()
	ctx := t.Context()
	stage := func(g uint64) { _, err := s.Stage(ctx, secretOf(g)); must(t, err) }
	stage(1)
	must(t, s.Promote(ctx, keyOf(1), store.Key{}))
	stage(2)
	must(t, s.Promote(ctx, keyOf(2), keyOf(1)))
	stage(3)
}

// holds wants these generations in current, pending and previous; 0 is empty.
func holds(t testing.TB, s interface {
	Get(context.Context, string, store.Stage) (store.Secret, error)
}, current, pending, previous uint64) {
	t.Helper()
	for _, w := range []struct {
		stage store.Stage
		g     uint64
	}{{store.Current, current}, {store.Pending, pending}, {store.Previous, previous}} {
		got, err := s.Get(context.Background(), id, w.stage)
		switch {
		case w.g == 0 && isEmpty(err):
		case err != nil:
			t.Errorf("%s: %v", w.stage, err)
		case w.g == 0:
			t.Errorf("%s holds %s, want nothing", w.stage, got.Key)
		case got.Key != keyOf(w.g) || !got.Material.Equal(secretOf(w.g).Material):
			t.Errorf("%s holds %s, want %s", w.stage, got.Key, keyOf(w.g))
		}
	}
}

// points are the places where a change can die, in order.
var points = []string{"decided", "created", "half written", "written", "synced", "renamed", "durable"}

// harness runs the suite on stores that tamper may have broken.
func harness(wrap func(*Store) store.Store) storetest.Harness {
	open := func(t testing.TB, cfg Config) store.Store { return wrap(newStore(t, cfg)) }
	return storetest.Harness{
		New: func(t testing.TB, n int) []store.Store {
			dir := filepath.Join(t.TempDir(), "secrets")
			var all []store.Store
			for range n {
				all = append(all, open(t, Config{Dir: dir}))
			}
			return all
		},
		Points:     points,
		Promotions: 25,
		Dying: func(t testing.TB, point string) (store.Store, func(), func() store.Store) {
			dir := filepath.Join(t.TempDir(), "secrets")
			armed := false
			s := open(t, Config{Dir: dir, failpoint: func(p string) {
				if armed && p == point {
					armed = false
					panic("killed at " + p)
				}
			}})
			return s, func() { armed = true }, func() store.Store { return open(t, Config{Dir: dir}) }
		},
	}
}

func asIs(s *Store) store.Store { return s }

func TestStore(t *testing.T) {
	if r := storetest.Run(t, harness(asIs)); len(r.Skipped) > 0 {
		t.Errorf("skipped %q", r.Skipped)
	}
}

// The points must be all that there are, or the crash checks miss one.
func TestPointsAreComplete(t *testing.T) {
	var seen []string
	s := newStore(t, Config{Dir: filepath.Join(t.TempDir(), "s"), failpoint: func(p string) { seen = append(seen, p) }})
	seen = nil
	_, err := s.Stage(t.Context(), secretOf(1))
	must(t, err)
	if !slices.Equal(seen, points) {
		t.Errorf("a stage comes to %q, want %q", seen, points)
	}
	// A repeat writes nothing, but makes durable what a dead process may only have renamed.
	seen = nil
	_, err = s.Stage(t.Context(), secretOf(1))
	must(t, err)
	if !slices.Equal(seen, []string{"decided", "durable"}) {
		t.Errorf("a repeated stage comes to %q", seen)
	}
}

// What a dead writer left is gone after the next start, and a living writer's is not.
func TestLeftoversAreRemoved(t *testing.T) {
	left := 0
	for _, point := range points {
		dir := filepath.Join(t.TempDir(), "secrets")
		armed := false
		s := newStore(t, Config{Dir: dir, failpoint: func(p string) {
			if armed && p == point {
				panic(p)
			}
		}})
		armed = true
		func() {
			defer func() { _ = recover() }()
			_, _ = s.Stage(t.Context(), secretOf(1))
		}()
		left += len(temps(t, dir))
		newStore(t, Config{Dir: dir})
		if now := temps(t, dir); len(now) > 0 {
			t.Errorf("dead at %q: left over: %q", point, now)
		}
	}
	if left != 4 { // created, half written, written, synced
		t.Errorf("the crashes left %d files: the test shows nothing", left)
	}

	dir := filepath.Join(t.TempDir(), "secrets")
	inWrite, goOn := make(chan struct{}), make(chan struct{})
	newStore(t, Config{Dir: dir}) // makes the key
	once := true
	s := newStore(t, Config{Dir: dir, failpoint: func(p string) {
		if p == "synced" && once {
			once = false
			close(inWrite)
			<-goOn
		}
	}})
	done := make(chan error)
	go func() {
		_, err := s.Stage(context.Background(), secretOf(2))
		done <- err
	}()
	<-inWrite
	newStore(t, Config{Dir: dir}) // cleans
	close(goOn)
	must(t, <-done)
	holds(t, s, 0, 2, 0)
}

func temps(t testing.TB, dir string) []string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	must(t, err)
	var found []string
	for _, e := range entries {
		if strings.Contains(e.Name(), tempMark) {
			found = append(found, e.Name())
		}
	}
	return found
}

// Whatever is on the disk, a secret is only there encrypted, and only this user can open it.
func TestDiskForm(t *testing.T) {
	root := t.TempDir()
	dir := filepath.Join(root, "a", "secrets")
	s := newStore(t, Config{Dir: dir})
	fill(t, s)
	must(t, s.Writable(t.Context(), id))
	must(t, s.Writable(t.Context(), "orders/never"))
	var names []string
	err := filepath.WalkDir(root, func(path string, d os.DirEntry, err error) error {
		must(t, err)
		info, err := d.Info()
		must(t, err)
		if path != root && info.Mode().Perm()&0o077 != 0 {
			t.Errorf("%s has mode %#o", path, info.Mode().Perm())
		}
		if d.Type().IsRegular() && !strings.Contains(path, locks) {
			names = append(names, strings.TrimPrefix(path, root))
			b, err := os.ReadFile(path)
			must(t, err)
			if strings.Contains(string(b), "canary") || strings.Contains(string(b), "hunter") {
				t.Errorf("%s holds plaintext", path)
			}
		}
		return nil
	})
	must(t, err)
	slices.Sort(names)
	if want := []string{"/a/secrets.key", "/a/secrets/orders.db.age"}; !slices.Equal(names, want) {
		t.Errorf("files %q, want %q", names, want)
	}
	if ref, want := s.Reference(id), "file:"+dir+"/orders.db.age"; ref != want {
		t.Errorf("reference %q, want %q", ref, want)
	}
	must(t, s.Close())
	if err := s.Writable(t.Context(), id); rotators.ClassOf(err) != rotators.Refused || !strings.Contains(err.Error(), "closed") {
		t.Errorf("after Close: %v", err)
	}
}

// A waiting writer gives up with its context and has changed nothing.
func TestLockWaitEndsWithContext(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "secrets")
	s := newStore(t, Config{Dir: dir})
	fill(t, s)
	release, err := flock(t.Context(), lockPath(dir, id))
	must(t, err)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- s.Promote(ctx, keyOf(3), keyOf(2)) }()
	runtime.Gosched()
	holds(t, s, 2, 3, 1) // readers do not wait for writers
	cancel()
	if err := <-done; rotators.ClassOf(err) != rotators.Transient || !rotators.Interrupted(err) {
		t.Errorf("got %v", err)
	}
	release()
	must(t, s.Promote(t.Context(), keyOf(3), keyOf(2)))
	holds(t, s, 3, 0, 2)
}

func TestReader(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "secrets")
	if _, err := Open(ReadConfig{Dir: dir}); err == nil || rotators.ClassOf(err) != rotators.Refused {
		t.Errorf("open what does not exist: %v", err)
	}
	if _, err := Open(ReadConfig{}); err == nil {
		t.Error("open nothing succeeded")
	}
	s := newStore(t, Config{Dir: dir})
	r, err := Open(ReadConfig{Dir: dir, IdentityFile: dir + ".key"})
	must(t, err)
	holds(t, r, 0, 0, 0)
	fill(t, s)
	holds(t, r, 2, 3, 1)
	if _, err := r.Get(t.Context(), "../x", store.Current); rotators.ClassOf(err) != rotators.Refused {
		t.Errorf("a bad id: %v", err)
	}
}

func BenchmarkRotation(b *testing.B) {
	s := newStore(b, Config{Dir: filepath.Join(b.TempDir(), "s")})
	from := store.Key{}
	for g := uint64(1); b.Loop(); g++ {
		n := store.Secret{Key: keyOf(g), Material: rotators.Text(map[string]string{"password": "p"})}
		if _, err := s.Stage(b.Context(), n); err != nil {
			b.Fatal(err)
		}
		if err := s.Promote(b.Context(), keyOf(g), from); err != nil {
			b.Fatal(err)
		}
		if err := s.Destroy(b.Context(), keyOf(max(g, 2)-1)); err != nil {
			b.Fatal(err)
		}
		from = keyOf(g)
	}
}

func BenchmarkGet(b *testing.B) {
	s := newStore(b, Config{Dir: filepath.Join(b.TempDir(), "s")})
	fill(b, s)
	for b.Loop() {
		if _, err := s.Get(b.Context(), id, store.Current); err != nil {
			b.Fatal(err)
		}
	}
}

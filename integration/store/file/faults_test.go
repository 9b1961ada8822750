package file

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"syscall"
	"testing"

	"filippo.io/age"

	"github.com/rekeyhq/rekey/integration/store"
	"github.com/rekeyhq/rekey/rotators"
)

func isEmpty(err error) bool { return errors.Is(err, store.ErrNotFound) }

// wants checks an error's class and that its text names all of these.
func wants(t *testing.T, err error, class rotators.Class, texts ...string) {
	t.Helper()
	var f *rotators.Fault
	if !errors.As(err, &f) {
		t.Errorf("got %v, want a fault", err)
		return
	}
	if f.Class != class {
		t.Errorf("class %s, want %s: %v", f.Class, class, err)
	}
	for _, text := range append(texts, "") {
		if !strings.Contains(err.Error(), text) {
			t.Errorf("the error does not say %q: %v", text, err)
		}
	}
	if strings.Contains(err.Error(), "hunter") || regexp.MustCompile("AGE-SECRET-KEY-1[A-Z0-9]").MatchString(err.Error()) {
		t.Errorf("the error holds a secret: %v", err)
	}
}

func TestConfigIsChecked(t *testing.T) {
	_, err := New(Config{Recipients: []string{"age1nonsense", "x"}})
	wants(t, err, rotators.Refused, "dir: missing", `"age1nonsense"`, `"x"`)
}

func TestUnsafeDirectory(t *testing.T) {
	for _, mode := range []os.FileMode{0o750, 0o705, 0o770, 0o777, 0o710} {
		dir := filepath.Join(t.TempDir(), "secrets")
		must(t, os.Mkdir(dir, 0o700))
		must(t, os.Chmod(dir, mode))
		_, err := New(Config{Dir: dir})
		wants(t, err, rotators.Refused, "chmod 700 "+dir)
	}
	file := filepath.Join(t.TempDir(), "plain")
	must(t, os.WriteFile(file, nil, 0o600))
	_, err := New(Config{Dir: file})
	wants(t, err, rotators.Transient, file)

	t.Run("foreign", func(t *testing.T) {
		if os.Geteuid() != 0 {
			t.Skip("foreign directory: only root can make one")
		}
		dir := filepath.Join(t.TempDir(), "secrets")
		must(t, os.Mkdir(dir, 0o700))
		must(t, os.Chown(dir, 65534, 65534))
		_, err := New(Config{Dir: dir})
		wants(t, err, rotators.Refused, "user 65534", "chown")
	})
}

func TestKey(t *testing.T) {
	t.Run("generated once and kept", func(t *testing.T) {
		dir := filepath.Join(t.TempDir(), "secrets")
		key := filepath.Join(t.TempDir(), "keys", "k")
		newStore(t, Config{Dir: dir, IdentityFile: key})
		first, err := os.ReadFile(key)
		must(t, err)
		info, err := os.Stat(key)
		must(t, err)
		if info.Mode().Perm() != 0o600 {
			t.Errorf("mode %#o", info.Mode().Perm())
		}
		fill(t, newStore(t, Config{Dir: dir, IdentityFile: key}))
		again, err := os.ReadFile(key)
		must(t, err)
		if !bytes.Equal(first, again) {
			t.Error("the key changed")
		}
	})
	t.Run("many starts at once share one key", func(t *testing.T) {
		dir := filepath.Join(t.TempDir(), "secrets")
		stores, errs := make(chan *Store, 8), make(chan error, 8)
		for range 8 {
			go func() {
				s, err := New(Config{Dir: dir})
				stores <- s
				errs <- err
			}()
		}
		var last *Store
		for range 8 {
			must(t, <-errs)
			if s := <-stores; last == nil {
				fill(t, s)
				last = s
			} else {
				holds(t, s, 2, 3, 1)
			}
		}
	})
	t.Run("never generated where secrets are", func(t *testing.T) {
		dir := filepath.Join(t.TempDir(), "secrets")
		fill(t, newStore(t, Config{Dir: dir}))
		must(t, os.Rename(dir+".key", dir+".backup"))
		_, err := New(Config{Dir: dir})
		wants(t, err, rotators.Refused, dir+".key", "1 secrets", "backup")
		if _, err := os.Stat(dir + ".key"); !errors.Is(err, os.ErrNotExist) {
			t.Error("a key was generated")
		}
		must(t, os.Rename(dir+".backup", dir+".key"))
		holds(t, newStore(t, Config{Dir: dir}), 2, 3, 1)
	})
	t.Run("wrong key", func(t *testing.T) {
		dir := filepath.Join(t.TempDir(), "secrets")
		s := newStore(t, Config{Dir: dir})
		fill(t, s)
		other := filepath.Join(t.TempDir(), "other")
		newStore(t, Config{Dir: filepath.Join(t.TempDir(), "elsewhere"), IdentityFile: other})
		_, err := New(Config{Dir: dir, IdentityFile: other})
		wants(t, err, rotators.Refused, other, filepath.Join(dir, "orders.db.age"))
		r, err := Open(ReadConfig{Dir: dir, IdentityFile: other})
		must(t, err)
		_, err = r.Get(t.Context(), id, store.Current)
		wants(t, err, rotators.Refused, other, filepath.Join(dir, "orders.db.age"))
		holds(t, s, 2, 3, 1)
	})
	t.Run("loose, empty or not a key", func(t *testing.T) {
		dir := filepath.Join(t.TempDir(), "secrets")
		fill(t, newStore(t, Config{Dir: dir}))
		key := dir + ".key"
		good, err := os.ReadFile(key)
		must(t, err)
		for _, mode := range []os.FileMode{0o644, 0o640, 0o604, 0o660} {
			must(t, os.Chmod(key, mode))
			_, err := New(Config{Dir: dir})
			wants(t, err, rotators.Refused, "chmod 600 "+key)
			_, err = Open(ReadConfig{Dir: dir})
			wants(t, err, rotators.Refused, "chmod 600 "+key)
		}
		must(t, os.Chmod(key, 0o600))
		for _, text := range []string{"", "# only a comment\n", "hunter2", strings.Replace(string(good), "AGE-SECRET-KEY-1", "AGE-SECRET-KEY-1Q", 1)} {
			must(t, os.WriteFile(key, []byte(text), 0o600))
			_, err := New(Config{Dir: dir})
			wants(t, err, rotators.Refused, key, "no age key")
		}
		if now, _ := os.ReadFile(key); bytes.Equal(now, good) {
			t.Error("the key was regenerated")
		}
	})
	t.Run("new key first, old one behind it", func(t *testing.T) {
		dir := filepath.Join(t.TempDir(), "secrets")
		s := newStore(t, Config{Dir: dir})
		fill(t, s)
		old, err := os.ReadFile(dir + ".key")
		must(t, err)
		next, err := age.GenerateX25519Identity()
		must(t, err)
		must(t, os.WriteFile(dir+".key", append([]byte(next.String()+"\n"), old...), 0o600))
		s = newStore(t, Config{Dir: dir})
		holds(t, s, 2, 3, 1)
		must(t, s.Promote(t.Context(), keyOf(3), keyOf(2)))
		must(t, os.WriteFile(dir+".key", []byte(next.String()), 0o600))
		holds(t, newStore(t, Config{Dir: dir}), 3, 0, 2)
	})
	t.Run("a crash while generating", func(t *testing.T) {
		for _, point := range []string{"created", "half written", "written", "synced"} {
			dir := filepath.Join(t.TempDir(), "secrets")
			func() {
				defer func() { _ = recover() }()
				_, _ = New(Config{Dir: dir, failpoint: func(p string) {
					if p == point {
						panic(p)
					}
				}})
			}()
			fill(t, newStore(t, Config{Dir: dir}))
			if left := temps(t, filepath.Dir(dir)); len(left) > 0 {
				t.Errorf("dead at %q left %q", point, left)
			}
		}
	})
	t.Run("a second recipient", func(t *testing.T) {
		dir := filepath.Join(t.TempDir(), "secrets")
		consumer, err := age.GenerateX25519Identity()
		must(t, err)
		key := filepath.Join(t.TempDir(), "consumer")
		must(t, os.WriteFile(key, []byte(consumer.String()), 0o600))
		fill(t, newStore(t, Config{Dir: dir, Recipients: []string{consumer.Recipient().String()}}))
		r, err := Open(ReadConfig{Dir: dir, IdentityFile: key})
		must(t, err)
		holds(t, r, 2, 3, 1)
	})
}

// A damaged file is refused by every call, and never overwritten.
func TestDamagedFile(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "secrets")
	s := newStore(t, Config{Dir: dir})
	fill(t, s)
	path := filepath.Join(dir, "orders.db.age")
	good, err := os.ReadFile(path)
	must(t, err)
	flip := func(i int) []byte { b := bytes.Clone(good); b[i] ^= 1; return b }
	seal := func(credential, text string) []byte {
		var out bytes.Buffer
		w, err := age.Encrypt(&out, s.recipients...)
		must(t, err)
		_, err = w.Write([]byte(text))
		must(t, err)
		must(t, w.Close())
		return out.Bytes()
	}
	for name, c := range map[string]struct {
		content []byte
		want    string
	}{
		"empty":              {nil, "damaged"},
		"half":               {good[:len(good)/2], "damaged"},
		"one byte short":     {good[:len(good)-1], "damaged"},
		"one byte more":      {append(bytes.Clone(good), 0), "damaged"},
		"header flipped":     {flip(5), "damaged"},
		"last byte flipped":  {flip(len(good) - 1), "damaged"},
		"not age":            {[]byte("hunter2"), "damaged"},
		"no JSON":            {seal(id, "hunter2"), "damaged"},
		"a newer schema":     {seal(id, `{"schema":2,"credential":"orders/db"}`), "newer rekey"},
		"another credential": {seal(id, `{"schema":1,"credential":"orders/other"}`), "copied or renamed"},
		"a foreign entry":    {seal(id, `{"schema":1,"credential":"orders/db","current":{"key":{"credential":"a/b","generation":1}}}`), "damaged"},
	} {
		t.Run(name, func(t *testing.T) {
			must(t, os.WriteFile(path, c.content, 0o600))
			ctx := t.Context()
			_, err := s.Get(ctx, id, store.Current)
			wants(t, err, rotators.Refused, path, c.want)
			if isEmpty(err) {
				t.Error("it is taken for empty")
			}
			_, err = s.Stage(ctx, secretOf(4))
			wants(t, err, rotators.Refused, path, c.want)
			wants(t, s.Promote(ctx, keyOf(3), keyOf(2)), rotators.Refused, path, c.want)
			wants(t, s.Discard(ctx, keyOf(3)), rotators.Refused, path, c.want)
			wants(t, s.Destroy(ctx, keyOf(1)), rotators.Refused, path, c.want)
			wants(t, s.Writable(ctx, id), rotators.Refused, path, c.want)
			if now, err := os.ReadFile(path); err != nil || !bytes.Equal(now, c.content) {
				t.Errorf("the file changed (%v)", err)
			}
			newStore(t, Config{Dir: dir}) // one damaged file does not keep the others from working
		})
	}
	must(t, os.WriteFile(path, good, 0o600))
	holds(t, s, 2, 3, 1)
}

func TestDirectoryGone(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "secrets")
	s := newStore(t, Config{Dir: dir})
	fill(t, s)
	must(t, os.Rename(dir, dir+".away"))
	_, err := s.Get(t.Context(), id, store.Current)
	wants(t, err, rotators.Transient, dir)
	must(t, os.MkdirAll(filepath.Join(dir, locks), 0o700)) // an empty mount point
	_, err = s.Get(t.Context(), id, store.Current)
	wants(t, err, rotators.Transient, "replaced or unmounted")
	_, err = s.Stage(t.Context(), secretOf(4))
	wants(t, err, rotators.Transient, "replaced or unmounted")
	copied, err := os.ReadFile(filepath.Join(dir+".away", "orders.db.age"))
	must(t, err)
	must(t, os.WriteFile(filepath.Join(dir, "orders.db.age"), copied, 0o600))
	wants(t, s.Promote(t.Context(), keyOf(3), keyOf(2)), rotators.Transient, "replaced or unmounted")
	must(t, os.RemoveAll(dir))
	must(t, os.Rename(dir+".away", dir))
	holds(t, s, 2, 3, 1)
}

// mount makes a tmpfs of the size and returns a store on it.
func mount(t *testing.T, what, size string) (*Store, string) {
	t.Helper()
	root := t.TempDir()
	if err := syscall.Mount("tmpfs", root, "tmpfs", 0, "size="+size+",mode=0700"); err != nil {
		t.Skipf("%s: mounting a tmpfs is not permitted: %v", what, err)
	}
	t.Cleanup(func() {
		if err := syscall.Unmount(root, 0); err != nil {
			t.Errorf("unmount: %v", err)
		}
	})
	return newStore(t, Config{Dir: filepath.Join(root, "secrets")}), root
}

func TestDiskFull(t *testing.T) {
	s, root := mount(t, "disk full", "512k")
	fill(t, s)
	ctx := t.Context()
	filler := filepath.Join(root, "filler")
	f, err := os.Create(filler)
	must(t, err)
	for err == nil {
		_, err = f.Write(make([]byte, 4096))
	}
	must(t, f.Close())
	for what, err := range map[string]error{
		"stage":    func() error { _, err := s.Stage(ctx, secretOf(4)); return err }(),
		"promote":  s.Promote(ctx, keyOf(3), keyOf(2)),
		"discard":  s.Discard(ctx, keyOf(3)),
		"destroy":  s.Destroy(ctx, keyOf(1)),
		"writable": s.Writable(ctx, id),
	} {
		t.Run(what, func(t *testing.T) { wants(t, err, rotators.Transient, "no space left", "free space") })
	}
	holds(t, s, 2, 3, 1)
	if left := temps(t, filepath.Join(root, "secrets")); len(left) > 0 {
		t.Errorf("left over: %q", left)
	}
	must(t, s.Promote(ctx, keyOf(2), keyOf(1))) // a repeat needs no space
	must(t, os.Remove(filler))
	must(t, s.Promote(ctx, keyOf(3), keyOf(2)))
	holds(t, s, 3, 0, 2)
}

func TestReadOnlyFileSystem(t *testing.T) {
	s, root := mount(t, "read-only file system", "512k")
	fill(t, s)
	if err := syscall.Mount("", root, "", syscall.MS_REMOUNT|syscall.MS_RDONLY, ""); err != nil {
		t.Skipf("read-only file system: %v", err)
	}
	ctx := t.Context()
	_, err := s.Stage(ctx, secretOf(4))
	wants(t, err, rotators.Refused, "read-only")
	wants(t, s.Promote(ctx, keyOf(3), keyOf(2)), rotators.Refused, "read-only")
	wants(t, s.Writable(ctx, id), rotators.Refused, "read-only")
	holds(t, s, 2, 3, 1)
	r, err := Open(ReadConfig{Dir: filepath.Join(root, "secrets")})
	must(t, err)
	holds(t, r, 2, 3, 1)
}

func TestPermissionDenied(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "secrets")
	s := newStore(t, Config{Dir: dir})
	fill(t, s)
	path := filepath.Join(dir, "orders.db.age")
	asUser(t, dir, func(ctx context.Context) {
		must(t, os.Chmod(dir, 0o500))
		_, err := s.Stage(ctx, secretOf(4))
		wants(t, err, rotators.Refused, "permission denied", dir)
		wants(t, s.Promote(ctx, keyOf(3), keyOf(2)), rotators.Refused, "permission denied")
		wants(t, s.Writable(ctx, id), rotators.Refused, "permission denied")
		holds(t, s, 2, 3, 1)
		must(t, os.Chmod(dir, 0o700))
		must(t, os.Chmod(path, 0))
		_, err = s.Get(ctx, id, store.Current)
		wants(t, err, rotators.Refused, "permission denied", path)
		_, err = s.Stage(ctx, secretOf(4))
		wants(t, err, rotators.Refused, "permission denied", path)
		must(t, os.Chmod(path, 0o600))
	})
	holds(t, s, 2, 3, 1)
}

// asUser runs f on a thread without root's right to pass over permissions; dir is given to its user.
func asUser(t *testing.T, dir string, f func(ctx context.Context)) {
	t.Helper()
	if os.Geteuid() != 0 {
		f(t.Context())
		return
	}
	const nobody = 65534
	must(t, filepath.WalkDir(filepath.Dir(dir), func(p string, _ os.DirEntry, err error) error {
		return errors.Join(err, os.Chown(p, nobody, nobody))
	}))
	for p := filepath.Dir(filepath.Dir(dir)); strings.HasPrefix(p, os.TempDir()+"/"); p = filepath.Dir(p) {
		must(t, os.Chmod(p, 0o755))
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // never unlocked: the thread ends with this goroutine
		if err := syscall.Setfsuid(nobody); err != nil {
			t.Errorf("setfsuid: %v", err)
			return
		}
		f(t.Context())
	}()
	<-done
}

// TestKilledWriter kills processes that promote in a loop. Whatever they were doing, the next process finds a whole state and
// goes on, and a reader never misses.
func TestKilledWriter(t *testing.T) {
	const kills = 15
	dir := filepath.Join(t.TempDir(), "secrets")
	s := newStore(t, Config{Dir: dir})
	_, err := s.Stage(t.Context(), secretOf(1))
	must(t, err)
	must(t, s.Promote(t.Context(), keyOf(1), store.Key{}))
	var last uint64
	for i := range kills {
		child := exec.Command(os.Args[0], "-test.run=^TestWriterProcess$")
		child.Env = append(os.Environ(), "REKEY_TEST_STORE="+dir)
		var out bytes.Buffer
		child.Stdout, child.Stderr = &out, &out
		must(t, child.Start())
		from := last
		for reads := 0; last < from+3+uint64(i%3) || reads < 10*i; reads++ { // never at the same moment
			got, err := s.Get(t.Context(), id, store.Current)
			if err != nil {
				_ = child.Process.Kill()
				_ = child.Wait()
				t.Fatalf("after %d kills: %v\n%s", i, err, out.Bytes())
			}
			if got.Key.Generation < last || !got.Material.Equal(bulky(got.Key.Generation).Material) && last > 1 {
				t.Errorf("current is %s after %d, or has other material", got.Key, last)
			}
			last = got.Key.Generation
		}
		must(t, child.Process.Kill())
		if err := child.Wait(); err == nil {
			t.Fatalf("the writer ended by itself: %s", out.Bytes())
		}
		current, err := s.Get(t.Context(), id, store.Current)
		must(t, err)
		last = current.Key.Generation
	}
	t.Logf("%d generations, %d kills", last, kills)
	newStore(t, Config{Dir: dir})
	if left := temps(t, dir); len(left) > 0 {
		t.Errorf("left over: %q", left)
	}
}

func bulky(g uint64) store.Secret {
	return store.Secret{Key: keyOf(g), Material: rotators.Text(map[string]string{"password": strings.Repeat(fmt.Sprint(g, " "), 1000)})}
}

// TestWriterProcess is the body of the processes that TestKilledWriter kills.
func TestWriterProcess(t *testing.T) {
	dir := os.Getenv("REKEY_TEST_STORE")
	if dir == "" {
		return // not a child
	}
	s := newStore(t, Config{Dir: dir})
	for {
		current, err := s.Get(t.Context(), id, store.Current)
		must(t, err)
		next := bulky(current.Key.Generation + 1)
		_, err = s.Stage(t.Context(), next)
		must(t, err)
		must(t, s.Promote(t.Context(), next.Key, current.Key))
		must(t, s.Destroy(t.Context(), current.Key))
	}
}

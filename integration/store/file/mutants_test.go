package file

import (
	"bytes"
	"context"
	"errors"
	"os"
	"testing"

	"github.com/rekeyhq/rekey/integration/store"
	"github.com/rekeyhq/rekey/integration/store/storetest"
	"github.com/rekeyhq/rekey/rotators"
)

// broken is a Store with some methods replaced.
type broken struct {
	*Store
	stage   func(context.Context, store.Secret) (store.Secret, error)
	promote func(ctx context.Context, to, from store.Key) error
	get     func(context.Context, string, store.Stage) (store.Secret, error)
	discard func(context.Context, store.Key) error
	destroy func(context.Context, store.Key) error
	check   func(context.Context, string) error
}

func (b broken) Stage(ctx context.Context, n store.Secret) (store.Secret, error) {
	if b.stage != nil {
		return b.stage(ctx, n)
	}
	return b.Store.Stage(ctx, n)
}

func (b broken) Promote(ctx context.Context, to, from store.Key) error {
	if b.promote != nil {
		return b.promote(ctx, to, from)
	}
	return b.Store.Promote(ctx, to, from)
}

func (b broken) Get(ctx context.Context, c string, s store.Stage) (store.Secret, error) {
	if b.get != nil {
		return b.get(ctx, c, s)
	}
	return b.Store.Get(ctx, c, s)
}

func (b broken) Discard(ctx context.Context, k store.Key) error {
	if b.discard != nil {
		return b.discard(ctx, k)
	}
	return b.Store.Discard(ctx, k)
}

func (b broken) Destroy(ctx context.Context, k store.Key) error {
	if b.destroy != nil {
		return b.destroy(ctx, k)
	}
	return b.Store.Destroy(ctx, k)
}

func (b broken) Writable(ctx context.Context, c string) error {
	if b.check != nil {
		return b.check(ctx, c)
	}
	return b.Store.Writable(ctx, c)
}

// mutants are stores that break one promise each, and the check that must notice.
var mutants = []struct {
	name, killer string
	make         func(*Store) store.Store
}{
	{"stage overwrites the material of its key", "stage repeated keeps the first material", func(s *Store) store.Store {
		return broken{Store: s, stage: func(ctx context.Context, n store.Secret) (store.Secret, error) {
			_ = s.Discard(ctx, n.Key)
			return s.Stage(ctx, n)
		}}
	}},
	{"stage returns what it was given", "stage repeated keeps the first material", func(s *Store) store.Store {
		return broken{Store: s, stage: func(ctx context.Context, n store.Secret) (store.Secret, error) {
			_, err := s.Stage(ctx, n)
			return n, err
		}}
	}},
	{"stage says nil where it conflicts", "stage below pending is a conflict", func(s *Store) store.Store {
		return broken{Store: s, stage: func(ctx context.Context, n store.Secret) (store.Secret, error) {
			got, err := s.Stage(ctx, n)
			if rotators.ClassOf(err) == rotators.Conflict {
				return n, nil
			}
			return got, err
		}}
	}},
	{"stage keeps an abandoned pending", "stage replaces a lower generation", func(s *Store) store.Store {
		return broken{Store: s, stage: func(ctx context.Context, n store.Secret) (store.Secret, error) {
			if p, err := s.Get(ctx, n.Key.Credential, store.Pending); err == nil && p.Key.Generation < n.Key.Generation {
				return n, nil
			}
			return s.Stage(ctx, n)
		}}
	}},
	{"a repeated promote is a conflict", "promote repeated is nil and changes nothing", func(s *Store) store.Store {
		return broken{Store: s, promote: func(ctx context.Context, to, from store.Key) error {
			if c, err := s.Get(ctx, to.Credential, store.Current); err == nil && c.Key.Same(to) {
				return rotators.Faultf(rotators.Conflict, "promote", "already current")
			}
			return s.Promote(ctx, to, from)
		}}
	}},
	{"promote does not look at from", "promote over a foreign current is a conflict", func(s *Store) store.Store {
		return broken{Store: s, promote: func(ctx context.Context, to, from store.Key) error {
			if c, err := s.Get(ctx, to.Credential, store.Current); err == nil {
				from = c.Key
			}
			return s.Promote(ctx, to, from)
		}}
	}},
	{"promote of nowhere is nil", "promote of what is nowhere is a conflict", func(s *Store) store.Store {
		return broken{Store: s, promote: func(ctx context.Context, to, from store.Key) error {
			_ = s.Promote(ctx, to, from)
			return nil
		}}
	}},
	{"promote drops the previous secret", "promote keeps what was current as previous", func(s *Store) store.Store {
		return broken{Store: s, promote: func(ctx context.Context, to, from store.Key) error {
			if err := s.Promote(ctx, to, from); err != nil || from.Generation == 0 {
				return err
			}
			return s.Destroy(ctx, from)
		}}
	}},
	{"promote drops pending", "promote of previous swaps the two and keeps pending", func(s *Store) store.Store {
		return broken{Store: s, promote: func(ctx context.Context, to, from store.Key) error {
			err := s.Promote(ctx, to, from)
			if p, e := s.Get(ctx, to.Credential, store.Pending); e == nil {
				_ = s.Discard(ctx, p.Key)
			}
			return err
		}}
	}},
	{"promote is stage by stage", "death in promote", func(s *Store) store.Store {
		return broken{Store: s, promote: func(ctx context.Context, to, from store.Key) error {
			now, err := s.Get(ctx, to.Credential, store.Pending)
			if err != nil {
				return s.Promote(ctx, to, from)
			}
			if err := s.Discard(ctx, to); err != nil {
				return err
			}
			if _, err := s.Stage(ctx, now); err != nil {
				return err
			}
			return s.Promote(ctx, to, from)
		}}
	}},
	{"destroy does not look at the key", "destroy removes previous by key and may be repeated", func(s *Store) store.Store {
		return broken{Store: s, destroy: func(ctx context.Context, k store.Key) error {
			if p, err := s.Get(ctx, k.Credential, store.Previous); err == nil {
				k = p.Key
			}
			return s.Destroy(ctx, k)
		}}
	}},
	{"discard does not look at the op", "discard removes pending by key and may be repeated", func(s *Store) store.Store {
		return broken{Store: s, discard: func(ctx context.Context, k store.Key) error {
			if p, err := s.Get(ctx, k.Credential, store.Pending); err == nil && p.Key.Generation == k.Generation {
				k = p.Key
			}
			return s.Discard(ctx, k)
		}}
	}},
	{"discard does nothing", "discard removes pending by key and may be repeated", func(s *Store) store.Store {
		return broken{Store: s, discard: func(context.Context, store.Key) error { return nil }}
	}},
	{"an empty stage is a zero secret", "an empty store has no secret", func(s *Store) store.Store {
		return broken{Store: s, get: func(ctx context.Context, c string, st store.Stage) (store.Secret, error) {
			got, err := s.Get(ctx, c, st)
			if errors.Is(err, store.ErrNotFound) {
				return store.Secret{}, nil
			}
			return got, err
		}}
	}},
	{"an empty stage is another error", "an empty store has no secret", func(s *Store) store.Store {
		return broken{Store: s, get: func(ctx context.Context, c string, st store.Stage) (store.Secret, error) {
			got, err := s.Get(ctx, c, st)
			if errors.Is(err, store.ErrNotFound) {
				return got, rotators.Faultf(rotators.Refused, "get", "nothing there")
			}
			return got, err
		}}
	}},
	{"values are text", "binary values come back as they were", func(s *Store) store.Store {
		return broken{Store: s, stage: func(ctx context.Context, n store.Secret) (store.Secret, error) {
			fields := n.Material.RevealAll()
			for k, v := range fields {
				fields[k] = bytes.ToValidUTF8(v, nil)
			}
			n.Material = rotators.NewMaterial(fields)
			return s.Stage(ctx, n)
		}}
	}},
	{"values are cut", "large values come back", func(s *Store) store.Store {
		return broken{Store: s, get: func(ctx context.Context, c string, st store.Stage) (store.Secret, error) {
			got, err := s.Get(ctx, c, st)
			fields := got.Material.RevealAll()
			for k, v := range fields {
				fields[k] = v[:min(len(v), 64<<10)]
			}
			got.Material = rotators.NewMaterial(fields)
			return got, err
		}}
	}},
	{"an error tells the secret", "errors hold no secret", func(s *Store) store.Store {
		return broken{Store: s, stage: func(ctx context.Context, n store.Secret) (store.Secret, error) {
			got, err := s.Stage(ctx, n)
			if err != nil {
				err = rotators.Faultf(rotators.ClassOf(err), "stage", "%s: %w", n.Material.Reveal("password"), err)
			}
			return got, err
		}}
	}},
	{"writable writes", "writable leaves nothing behind", func(s *Store) store.Store {
		return broken{Store: s, check: func(ctx context.Context, c string) error {
			k := keyOf(1 << 40)
			k.Credential = c
			_, err := s.Stage(ctx, store.Secret{Key: k, Material: rotators.Text(map[string]string{"probe": "x"})})
			return err
		}}
	}},
	{"the context is not looked at", "a cancelled context changes nothing", func(s *Store) store.Store {
		lock := s.lock
		s.lock = func(_ context.Context, path string) (func(), error) { return lock(context.Background(), path) }
		return s
	}},
	{"nothing is locked", "of concurrent stages of one key one material wins", func(s *Store) store.Store {
		s.lock = func(context.Context, string) (func(), error) { return func() {}, nil }
		return s
	}},
	{"writing in place", "death in stage", inPlace},
	{"writing in place", "a reader never misses current", inPlace},
	{"remove, then write", "a reader never misses current", func(s *Store) store.Store {
		atomically := s.replace
		s.replace = func(path string, data []byte) error {
			_ = os.Remove(path)
			return atomically(path, data)
		}
		return s
	}},
	{"remove, then write", "death in promote", func(s *Store) store.Store {
		atomically := s.replace
		s.replace = func(path string, data []byte) error {
			_ = os.Remove(path)
			return atomically(path, data)
		}
		return s
	}},
}

func inPlace(s *Store) store.Store {
	s.replace = func(path string, data []byte) error {
		f, err := os.Create(path)
		if err != nil {
			return err
		}
		defer f.Close()
		for i, part := range [][]byte{data[:len(data)/2], data[len(data)/2:]} {
			if _, err := f.Write(part); err != nil {
				return err
			}
			s.reach([]string{"half written", "written"}[i])
		}
		return f.Sync()
	}
	return s
}

// TestMutants shows that the suite finds broken stores: each is killed by the check that is about its defect.
func TestMutants(t *testing.T) {
	checks := map[string]storetest.Check{}
	for _, c := range storetest.Checks() {
		checks[c.Name] = c
	}
	for _, m := range mutants {
		t.Run(m.name, func(t *testing.T) {
			c, ok := checks[m.killer]
			if !ok {
				t.Fatalf("there is no check %q", m.killer)
			}
			err := storetest.Try(t, c, harness(m.make))
			if err == nil {
				t.Errorf("%q passes a store where %s", m.killer, m.name)
			}
			t.Log(err)
		})
	}
}

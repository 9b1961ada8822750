//go:build linux

package e2e

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/rekeyhq/rekey/integration/store"
	"github.com/rekeyhq/rekey/integration/store/file"
	"github.com/rekeyhq/rekey/rotators"
)

// consumers read the store and log in, over and over, and know every secret that they have seen.
type consumers struct {
	s      *site
	pace   time.Duration // between two logins of one client
	reader *file.Reader
	logins atomic.Int64
	// late counts logins that failed more than the overlap after the store was read, when it already said something newer: a
	// consumer so slow (a loaded machine) has to read again, and nothing was promised to it.
	late atomic.Int64

	mu       sync.Mutex
	problems []string
	secrets  map[string]bool

	stopping chan struct{}
	once     sync.Once
	wg       sync.WaitGroup
}

// consume starts n clients and one watcher for each credential.
func (s *site) consume(n int) *consumers {
	s.t.Helper()
	return s.consumeAt(n, pace)
}

func (s *site) consumeAt(n int, pace time.Duration) *consumers {
	s.t.Helper()
	c := &consumers{s: s, pace: pace, reader: s.reader(), secrets: map[string]bool{}, stopping: make(chan struct{})}
	for _, p := range s.pairs {
		for i := range n {
			c.wg.Go(func() { c.client(p, i) })
		}
		c.wg.Go(func() { c.watch(p) })
	}
	s.t.Cleanup(func() { c.stop() })
	return c
}

// stop ends the clients. It may be called twice.
func (c *consumers) stop() {
	c.once.Do(func() { close(c.stopping) })
	c.wg.Wait()
}

// judge stops and fails the test for every failed login.
func (c *consumers) judge(t *testing.T, least int64) {
	t.Helper()
	c.stop()
	c.mu.Lock()
	defer c.mu.Unlock()
	t.Logf("%d logins, %d failed; %d came too late to count", c.logins.Load(), len(c.problems), c.late.Load())
	for i, p := range c.problems {
		if i == 20 {
			t.Errorf("and %d more", len(c.problems)-i)
			break
		}
		t.Error(p)
	}
	if c.logins.Load() < least {
		t.Errorf("%d logins prove little, want %d", c.logins.Load(), least)
	}
}

func (c *consumers) failed(format string, args ...any) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.problems = append(c.problems, time.Now().Format("15:04:05.000 ")+fmt.Sprintf(format, args...))
}

// saw remembers a secret for the search at the end.
func (c *consumers) saw(s store.Secret) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.secrets[string(s.Material.Reveal(rotators.FieldPassword))] = true
}

func (c *consumers) seen() []string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.Sorted(maps.Keys(c.secrets))
}

// each calls fn about every pace until the end.
func (c *consumers) each(pace time.Duration, fn func()) {
	tick := time.NewTicker(pace)
	defer tick.Stop()
	for {
		select {
		case <-c.stopping:
			return
		case <-tick.C:
			fn()
		}
	}
}

// client logs in with what the store says, and in each generation makes a table, and uses and alters the one before.
func (c *consumers) client(p pair, number int) {
	ctx := context.Background()
	var made []uint64
	c.each(c.pace, func() {
		read := time.Now()
		secret, err := c.reader.Get(ctx, string(p.id), store.Current)
		if err != nil {
			c.failed("%s: read the store: %v", p.id, err)
			return
		}
		generation := secret.Key.Generation
		err = c.use(ctx, p, secret, func(conn *pgx.Conn) error {
			if n := len(made); n > 0 && made[n-1] == generation {
				return nil
			}
			table := func(g uint64) string { return fmt.Sprintf("%s.t_%d_%d", p.schema, number, g) }
			sql := []string{fmt.Sprintf("CREATE TABLE %s (generation bigint)", table(generation))}
			for _, g := range append(made[max(0, len(made)-2):], generation) {
				sql = append(sql, fmt.Sprintf("INSERT INTO %s VALUES (%d)", table(g), generation),
					fmt.Sprintf("ALTER TABLE %s ADD COLUMN by_%d bool", table(g), generation))
			}
			if _, err := conn.Exec(ctx, strings.Join(sql, "; ")); err != nil { // one transaction
				return err
			}
			made = append(made, generation)
			return nil
		})
		if err == nil {
			c.logins.Add(1)
			return
		}
		if after := time.Since(read); after >= overlapMin {
			if now, err := c.reader.Get(ctx, string(p.id), store.Current); err == nil && now.Key.Generation > generation {
				c.late.Add(1)
				return
			}
		}
		c.failed("%s generation %d as %s, %s after it was read: %v", p.id, generation, secret.Key.Version, time.Since(read), err)
	})
}

// use logs in, asks who it is, does something and leaves.
func (c *consumers) use(ctx context.Context, p pair, secret store.Secret, do func(*pgx.Conn) error) error {
	conn, err := c.s.dial(ctx, secret.Material)
	if err != nil {
		return err
	}
	defer conn.Close(ctx)
	var session, current string
	if err := conn.QueryRow(ctx, "SELECT session_user, current_user").Scan(&session, &current); err != nil {
		return err
	}
	if session != string(secret.Key.Version) || current != p.owner {
		return fmt.Errorf("it is %s and acts as %s, not as the owner %s", session, current, p.owner)
	}
	return do(conn)
}

// held is one generation with a session that was opened with it and never closed.
type held struct {
	secret  store.Secret
	session *pgx.Conn
}

// watch follows one credential: when a new generation appears, the one before must still work, and the one before that must be dead, its
// session too. It also collects what is pending, for the search for secrets.
func (c *consumers) watch(p pair) {
	ctx := context.Background()
	var past []held
	defer func() {
		for _, h := range past {
			h.session.Close(ctx)
		}
	}()
	var lastRead time.Time // when the store was last looked at and still said the newest of past
	var lastFile os.FileInfo
	c.each(10*time.Millisecond, func() {
		look := time.Now()
		info, err := os.Stat(c.s.reference(p))
		if err != nil {
			c.failed("%s: %v", p.id, err)
			return
		}
		if lastFile != nil && os.SameFile(info, lastFile) && info.ModTime().Equal(lastFile.ModTime()) { // it is replaced as a whole
			lastRead = look
			return
		}
		for _, stage := range []store.Stage{store.Pending, store.Previous} {
			if s, err := c.reader.Get(ctx, string(p.id), stage); err == nil {
				c.saw(s)
			}
		}
		read := time.Now()
		secret, err := c.reader.Get(ctx, string(p.id), store.Current)
		if err != nil {
			c.failed("%s: read the store: %v", p.id, err)
			return
		}
		if n := len(past); n > 0 && past[n-1].secret.Key.Same(secret.Key) {
			lastRead, lastFile = read, info
			return
		}
		c.saw(secret)
		if n := len(past); n > 1 {
			c.dead(ctx, p, past[n-2])
		}
		conn, err := c.s.dial(ctx, secret.Material)
		if err != nil {
			if time.Since(read) < overlapMin {
				c.failed("%s generation %d: %v", p.id, secret.Key.Generation, err)
			}
			return
		}
		past = append(past, held{secret, conn})
		if n := len(past); n > 1 {
			c.overlaps(ctx, p, past[n-2], lastRead)
		}
		lastRead, lastFile = read, info
	})
	// At the end everything is at rest: all but the newest are dead.
	for _, h := range past[:max(0, len(past)-1)] {
		c.dead(ctx, p, h)
	}
}

// overlaps fails the test if a generation that the store still named at an instant is refused before the overlap after it is over.
func (c *consumers) overlaps(ctx context.Context, p pair, h held, named time.Time) {
	tick := time.NewTicker(overlapMin / 10)
	defer tick.Stop()
	for {
		verdict := c.s.login(ctx, h.secret.Material)
		if time.Since(named) >= overlapMin {
			return
		}
		if verdict != rotators.Accepted {
			c.failed("%s generation %d: %s, %s after the store had named it", p.id, h.secret.Key.Generation, verdict, time.Since(named))
			return
		}
		select {
		case <-c.stopping:
			return
		case <-tick.C:
		}
	}
}

// dead fails the test if a retired generation still lets anybody in, or its session lives.
func (c *consumers) dead(ctx context.Context, p pair, h held) {
	if v := c.s.login(ctx, h.secret.Material); v != rotators.Rejected {
		c.failed("%s: retired generation %d is %s", p.id, h.secret.Key.Generation, v)
	}
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	if _, err := h.session.Exec(ctx, "SELECT 1"); err == nil {
		c.failed("%s: a session of retired generation %d lives", p.id, h.secret.Key.Generation)
	} else if errors.Is(err, context.DeadlineExceeded) {
		c.failed("%s: the session of retired generation %d: %v", p.id, h.secret.Key.Generation, err)
	}
}

// owned fails the test if a table belongs to anybody but the owner role; it returns how many there are.
func (s *site) owned() int {
	s.t.Helper()
	rows, err := s.super.Query(s.t.Context(), "SELECT schemaname, tablename, tableowner FROM pg_tables WHERE schemaname LIKE 's%' AND schemaname NOT LIKE 'pg%'")
	if err != nil {
		s.t.Fatal(err)
	}
	type table struct{ Schema, Name, Owner string }
	tables, err := pgx.CollectRows(rows, pgx.RowToStructByPos[table])
	if err != nil {
		s.t.Fatal(err)
	}
	for _, x := range tables {
		i := slices.IndexFunc(s.pairs, func(p pair) bool { return p.schema == x.Schema })
		if i < 0 || s.pairs[i].owner != x.Owner {
			s.t.Errorf("table %s.%s belongs to %s", x.Schema, x.Name, x.Owner)
		}
	}
	return len(tables)
}

func readToken(path string) (string, error) {
	b, err := os.ReadFile(path)
	return strings.TrimSpace(string(b)), err
}

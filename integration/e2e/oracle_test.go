//go:build linux

package e2e

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/rekeyhq/rekey/events"
	"github.com/rekeyhq/rekey/integration/store"
	"github.com/rekeyhq/rekey/integration/store/file"
	"github.com/rekeyhq/rekey/internal/api"
	"github.com/rekeyhq/rekey/internal/credential"
	"github.com/rekeyhq/rekey/internal/ledger"
	"github.com/rekeyhq/rekey/rotators"
	"github.com/rekeyhq/rekey/rotators/postgres"
)

// client is the API's client, with the admin token that the server wrote.
func (s *site) client(config string) (*api.Client, error) {
	token, err := readToken(filepath.Join(s.dataDir(config), api.AdminTokenFile))
	if err != nil {
		return nil, err
	}
	return api.NewClient(api.ClientConfig{Address: s.listen(config), Token: token, Timeout: 20 * time.Second})
}

func (s *site) status(config string) ([]api.Credential, error) {
	c, err := s.client(config)
	if err != nil {
		return nil, err
	}
	return c.List(s.t.Context(), api.Filter{})
}

// ledger connects to the engine's ledger as another engine process would.
func (s *site) ledger(config string) *ledger.Ledger {
	s.t.Helper()
	cfg := ledger.ConnectConfig{URL: fmt.Sprintf("nats://127.0.0.1:%d", s.natsPort(config)), CredsFile: filepath.Join(s.dataDir(config), "nats", ledger.EngineCreds)}
	if s.nats != nil {
		cfg = ledger.ConnectConfig{URL: s.nats.URL, CredsFile: s.nats.CredsFile}
	}
	nc, err := ledger.Connect(s.t.Context(), cfg)
	if err != nil {
		s.t.Fatal(err)
	}
	l, err := ledger.Open(s.t.Context(), ledger.Config{Conn: nc})
	if err != nil {
		nc.Close()
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { l.Close(); nc.Close() })
	return l
}

// reader opens the store as a consumer does.
func (s *site) reader() *file.Reader {
	s.t.Helper()
	r, err := file.Open(file.ReadConfig{Dir: s.path("secrets")})
	if err != nil {
		s.t.Fatal(err)
	}
	return r
}

// reference is the file that holds a credential's secrets.
func (s *site) reference(p pair) string {
	return s.path(filepath.Join("secrets", strings.Replace(string(p.id), "/", ".", 1)+".age"))
}

// current is the generation that consumers read now.
func (s *site) current(id credential.ID) (uint64, error) {
	secret, err := s.reader().Get(s.t.Context(), string(id), store.Current)
	return secret.Key.Generation, err
}

// observe collects everything that can be seen. The system should be at rest, or a commit may fall between two looks.
func (s *site) observe(l *ledger.Ledger) credential.Observation {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(s.t.Context(), time.Minute)
	defer cancel()
	o := credential.Observation{
		Now: time.Now(), Census: map[credential.ID][]rotators.VersionInfo{}, Stored: map[credential.ID]map[string]credential.Published{},
		Verdicts: map[credential.ID]map[string]rotators.Verdict{}, Entries: []credential.Entry{}, Events: []credential.Seen{},
	}
	must := func(err error) {
		s.t.Helper()
		if err != nil {
			s.t.Fatal(err)
		}
	}
	must(l.CatchUp(ctx))
	var err error
	o.Records, err = l.List(ctx)
	must(err)
	must(l.Audit(ctx, ledger.Query{}, func(e credential.Entry, _ uint64) error {
		o.Entries = append(o.Entries, e)
		return nil
	}))
	notices := map[string]string{}
	for _, n := range []string{credential.NoticeRotated, credential.NoticeRevoked, credential.NoticeRotationFailed,
		credential.NoticeOverlapEnding, credential.NoticeOverdue, credential.NoticeSuspended} {
		notices[events.TypeOf(n)] = n
	}
	must(l.Events(ctx, ledger.Query{}, func(e events.Event) error {
		o.Events = append(o.Events, credential.Seen{Credential: credential.ID(e.Subject), Type: notices[e.Type], Rev: e.Data.Rev, ID: e.ID})
		return nil
	}))
	reader := s.reader()
	for _, p := range s.pairs {
		o.Census[p.id], err = s.inspect(ctx, p)
		must(err)
		o.Stored[p.id], o.Verdicts[p.id] = map[string]credential.Published{}, map[string]rotators.Verdict{}
		for _, stage := range []store.Stage{store.Current, store.Pending, store.Previous} {
			secret, err := reader.Get(ctx, string(p.id), stage)
			if errors.Is(err, store.ErrNotFound) {
				continue
			}
			must(err)
			o.Stored[p.id][string(stage)] = credential.Published{Generation: secret.Key.Generation, OpID: secret.Key.OpID, Version: secret.Key.Version}
			o.Verdicts[p.id][string(stage)] = s.login(ctx, secret.Material)
		}
	}
	return o
}

// inspect is the issuer's census, taken as the superuser.
func (s *site) inspect(ctx context.Context, p pair) ([]rotators.VersionInfo, error) {
	r, err := postgres.New(postgres.Config{
		Target: postgres.TargetConfig{
			Host: s.pg.Host, Port: s.pg.Port, Database: s.name, TLS: postgres.TLS{Mode: postgres.Disable},
			Admin: postgres.Admin{Username: s.pg.User, Password: "file:/the/superuser"},
		},
		Credential: postgres.CredentialConfig{Owner: p.owner, Roles: []string{p.a, p.b}}, ID: string(p.id),
		Resolve: func(context.Context, string) ([]byte, error) { return []byte(s.pg.Password), nil },
	})
	if err != nil {
		return nil, err
	}
	defer r.Close()
	return r.Inspect(ctx)
}

// login is a consumer's login, and what the server said to it.
func (s *site) login(ctx context.Context, m rotators.Material) rotators.Verdict {
	conn, err := s.dial(ctx, m)
	var pg *pgconn.PgError
	switch {
	case err == nil:
		_ = conn.Close(ctx)
		return rotators.Accepted
	case errors.As(err, &pg) && (pg.Code == "28P01" || pg.Code == "28000"):
		return rotators.Rejected
	default:
		return rotators.Unknown
	}
}

// dial connects with nothing but what the store says; only the proxy that some tests put between is left out.
func (s *site) dial(ctx context.Context, m rotators.Material) (*pgx.Conn, error) {
	cfg, err := pgx.ParseConfig(string(m.Reveal(rotators.FieldDSN)))
	if err != nil {
		return nil, err
	}
	cfg.Port, cfg.Fallbacks, cfg.ConnectTimeout = uint16(s.pg.Port), nil, 10*time.Second //nolint:gosec // a port
	return pgx.ConnectConfig(ctx, cfg)
}

// judge fails the test for everything that breaks an invariant, in rekey's own oracle and in what the database says about logins.
func (s *site) judge(l *ledger.Ledger) credential.Observation {
	s.t.Helper()
	return s.judgeBut(l)
}

// judgeBut is judge, where other roles may log in too.
func (s *site) judgeBut(l *ledger.Ledger, others ...string) credential.Observation {
	s.t.Helper()
	o := s.observe(l)
	for _, v := range credential.Audit(o) {
		s.t.Error(v)
	}
	if len(o.Records) != len(s.pairs) {
		s.t.Errorf("the ledger has %d records of %d credentials", len(o.Records), len(s.pairs))
	}
	want := others
	for _, r := range o.Records {
		if r.Phase == credential.Idle && o.Verdicts[r.ID]["current"] != rotators.Accepted {
			s.t.Errorf("%s: what consumers read is %s", r.ID, o.Verdicts[r.ID]["current"])
		}
		if r.Current != nil {
			want = append(want, string(r.Current.ID))
		}
		if r.Claim != nil {
			s.t.Errorf("%s: still claimed by %s for %s", r.ID, r.Claim.Worker, r.Claim.Phase)
		}
	}
	slices.Sort(want)
	if got := s.logins(); strings.Join(got, " ") != strings.Join(want, " ") {
		s.t.Errorf("roles that may log in: %v; should be %v", got, want)
	}
	return o
}

// verified runs `rekey audit verify`.
func (s *site) verified(config string) {
	s.t.Helper()
	s.t.Log(strings.TrimSpace(s.must(config, "audit", "verify")))
}

// actors are the worker processes that committed, without the number of the pass.
func actors(entries []credential.Entry) []string {
	seen := map[string]bool{}
	for _, e := range entries {
		if name, _, pass := strings.Cut(e.Actor, "#"); pass {
			seen[name] = true
		}
	}
	return slices.Sorted(maps.Keys(seen))
}

// standstill is the longest time in which nothing was committed for a credential although it was neither idle nor in its overlap.
func standstill(entries []credential.Entry) (longest time.Duration, what string) {
	last := map[credential.ID]credential.Entry{}
	for _, e := range entries {
		was, ok := last[e.Credential]
		last[e.Credential] = e
		if !ok || was.To == credential.Idle || was.To == credential.Draining || was.To == credential.Suspended {
			continue
		}
		if d := e.At.Sub(was.At); d > longest {
			longest, what = d, fmt.Sprintf("%s between %q and %q", e.Credential, was.Action, e.Action)
		}
	}
	return longest, what
}

package postgres

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"net/url"
	"slices"
	"strings"
	"testing"

	"github.com/rekeyhq/rekey/rotators"
)

func TestValidateReturnsEveryProblem(t *testing.T) {
	good := TargetConfig{Host: "db.example.com", Admin: Admin{Username: "rekey_admin", Password: "file:/run/pw"}}
	if err := good.Validate(); err != nil {
		t.Fatal(err)
	}
	for _, row := range []struct {
		change func(*TargetConfig)
		want   []string
	}{
		{func(c *TargetConfig) { *c = TargetConfig{} }, []string{"host", "admin.username", "admin.password"}},
		{func(c *TargetConfig) { c.Host, c.Port = "db:5432", 70000 }, nil},
		{func(c *TargetConfig) { c.Host = "a b" }, []string{`host "a b"`}},
		{func(c *TargetConfig) { c.Host = "a,b" }, []string{`host "a,b"`}},
		{func(c *TargetConfig) { c.Host = "relative/dir" }, []string{"host"}},
		{func(c *TargetConfig) { c.Port = -1 }, []string{"port -1"}},
		{func(c *TargetConfig) { c.Database = "a/b?c" }, []string{"database"}},
		{func(c *TargetConfig) { c.TLS.Mode = "prefer" }, []string{`tls.mode "prefer"`}},
		{func(c *TargetConfig) { c.TLS.Mode = Disable }, []string{"db.example.com is on a network"}},
		{func(c *TargetConfig) { c.TLS.Mode, c.TLS.AllowPlaintext = Disable, true }, nil},
		{func(c *TargetConfig) { c.TLS.Mode, c.Host = Disable, "127.0.0.1" }, nil},
		{func(c *TargetConfig) { c.TLS.Mode, c.Host = Disable, "::1" }, nil},
		{func(c *TargetConfig) { c.TLS.Mode, c.Host = Disable, "/run/postgresql" }, nil},
		{func(c *TargetConfig) { c.TLS.Mode, c.Host, c.Replicas = Disable, "localhost", []string{"far"} }, []string{"far is on"}},
		{func(c *TargetConfig) { c.Replicas = []string{"db.example.com", "r:0", "r2:99"} }, []string{"named twice", `"r:0"`}},
	} {
		c := good
		row.change(&c)
		err := c.Validate()
		if row.want == nil && err != nil && c.Port != 70000 {
			t.Errorf("%+v: %v", c, err)
		}
		for _, w := range row.want {
			if err == nil || !strings.Contains(err.Error(), w) {
				t.Errorf("%+v: want a mention of %q in: %v", c, w, err)
			}
		}
	}
	for _, row := range []struct {
		c    CredentialConfig
		want []string
	}{
		{CredentialConfig{Owner: "o", Roles: []string{"a", "b"}}, nil},
		{CredentialConfig{Roles: []string{"a"}}, nil},
		{CredentialConfig{}, []string{"roles"}},
		{CredentialConfig{Owner: "o", Roles: []string{"a", "b", "c"}}, []string{"got 3"}},
		{CredentialConfig{Roles: []string{"a", "b"}}, []string{"owner_role: missing"}},
		{CredentialConfig{Owner: "a", Roles: []string{"a", "a"}}, []string{"named twice", "is one of the roles"}},
		{CredentialConfig{Owner: "pg_o", Roles: []string{"A", "b-c"}}, []string{`"pg_o"`, `"A"`, `"b-c"`}},
		{CredentialConfig{Owner: "o", Roles: []string{"public", strings.Repeat("x", 64)}}, []string{"public", "1 to 63"}},
		{CredentialConfig{Owner: "o", Roles: []string{`a"; DROP ROLE x; --`, "b"}, Database: "x y", Probe: "a\x00"}, []string{"DROP ROLE", "database", "probe"}},
	} {
		err := row.c.Validate()
		if (err == nil) != (row.want == nil) {
			t.Errorf("%+v: %v", row.c, err)
		}
		for _, w := range row.want {
			if err == nil || !strings.Contains(err.Error(), w) {
				t.Errorf("%+v: want a mention of %q in: %v", row.c, w, err)
			}
		}
	}
	if got := (CredentialConfig{Roles: []string{"a", "b"}}).Claims(); !slices.Equal(got, []string{"role/a", "role/b"}) {
		t.Errorf("claims %v", got)
	}
}

func TestNewRefusesToRotateItsOwnAdmin(t *testing.T) {
	resolve := func(context.Context, string) ([]byte, error) { return nil, nil }
	_, err := New(Config{
		ID: "t/c", Resolve: resolve, Adopted: "nobody",
		Target:     TargetConfig{Host: "h", Admin: Admin{Username: "b", Password: "x"}},
		Credential: CredentialConfig{Owner: "o", Roles: []string{"a", "b"}},
	})
	for _, want := range []string{"the target's admin", `adopted role "nobody"`} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("want a mention of %q in: %v", want, err)
		}
	}
	if _, err := New(Config{}); err == nil || !strings.Contains(err.Error(), "Config.ID") || !strings.Contains(err.Error(), "Config.Resolve") {
		t.Errorf("got %v", err)
	}
}

func TestConfigIsStrictJSON(t *testing.T) {
	c := TargetConfig{Host: "h", Port: 1, Admin: Admin{"u", "env:P"}, TLS: TLS{Mode: Require, CAFile: "f", AllowPlaintext: true}, Replicas: []string{"r"}}
	b, err := json.Marshal(c)
	if err != nil {
		t.Fatal(err)
	}
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	var back TargetConfig
	if err := d.Decode(&back); err != nil || back.TLS != c.TLS || back.Admin != c.Admin {
		t.Errorf("%s: %+v, %v", b, back, err)
	}
	if strings.Contains(string(b), "TLS") {
		t.Errorf("untagged field in %s", b)
	}
}

func composer(t *testing.T, target TargetConfig, roles ...string) *Rotator {
	t.Helper()
	target.Admin = Admin{Username: "adm", Password: "env:x"}
	r, err := New(Config{
		ID: "t/c", Target: target, Credential: CredentialConfig{Owner: "o", Roles: roles, Database: "app"},
		Resolve: func(context.Context, string) ([]byte, error) { return nil, nil },
	})
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func TestComposeGivesAWholeURL(t *testing.T) {
	for _, row := range []struct {
		target TargetConfig
		want   string
	}{
		{TargetConfig{Host: "db.example.com"}, "postgres://a:PW@db.example.com:5432/app?sslmode=verify-full"},
		{TargetConfig{Host: "::1", Port: 5433, TLS: TLS{Mode: Disable}}, "postgres://a:PW@[::1]:5433/app?sslmode=disable"},
		{TargetConfig{Host: "/run/pg"}, "postgres://a:PW@/app?host=%2Frun%2Fpg&port=5432&sslmode=disable"},
	} {
		_, m, err := composer(t, row.target, "a", "b").Compose(someOp(0, 1), nil, rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		want := strings.Replace(row.want, "PW", string(m.Reveal("password")), 1)
		if got := string(m.Reveal(rotators.FieldDSN)); got != want {
			t.Errorf("got %s, want %s", got, want)
		}
		if u, err := url.Parse(string(m.Reveal(rotators.FieldDSN))); err != nil || u.User.Username() != "a" {
			t.Errorf("%v, %v", u, err)
		}
		if len(m.Reveal("password")) != passwordLength || string(m.Reveal("host")) != row.target.Host || string(m.Reveal("database")) != "app" {
			t.Errorf("fields of %+v: %v", row.target, m.Names())
		}
	}
}

// TestPasswordsAreUnbiased: over all values of a source's byte, each letter comes up equally often.
func TestPasswordsAreUnbiased(t *testing.T) {
	r := composer(t, TargetConfig{Host: "h"}, "a")
	count := map[byte]int{}
	for i := range 256 {
		_, m, err := r.Compose(someOp(0, 1), nil, bytes.NewReader(bytes.Repeat([]byte{byte(i)}, passwordLength)))
		if err != nil {
			t.Fatal(err)
		}
		count[m.Reveal("password")[0]]++
	}
	if len(count) != 64 {
		t.Fatalf("%d letters", len(count))
	}
	for c, n := range count {
		if n != 4 || !strings.ContainsRune("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_-", rune(c)) {
			t.Errorf("letter %q comes up %d times", c, n)
		}
	}
}

// TestVerifierIsRepeatable: that the server takes it is shown by every login of this package.
func TestVerifierIsRepeatable(t *testing.T) {
	salt := bytes.Repeat([]byte{7}, 16)
	a, err := verifier([]byte("pencil"), bytes.NewReader(salt))
	if err != nil {
		t.Fatal(err)
	}
	b, _ := verifier([]byte("pencil"), bytes.NewReader(salt))
	c, _ := verifier([]byte("pencils"), bytes.NewReader(salt))
	if a != b || a == c || !strings.HasPrefix(a, "SCRAM-SHA-256$4096:") {
		t.Errorf("%s\n%s\n%s", a, b, c)
	}
	if _, err := verifier([]byte("pencil"), bytes.NewReader(salt[:3])); err == nil {
		t.Error("a source that ends gave a verifier")
	}
}

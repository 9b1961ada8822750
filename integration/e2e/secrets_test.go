//go:build linux

package e2e

import (
	"bytes"
	"crypto/rand"
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/rekeyhq/rekey/integration/store"
	"github.com/rekeyhq/rekey/rotators"
)

// forms are the ways in which a secret may leak. Passwords hold only letters that URLs and JSON leave as they are.
func forms(secret string) map[string][]byte {
	f := map[string][]byte{
		"raw": []byte(secret),
		"hex": []byte(hex.EncodeToString([]byte(secret))),
		"HEX": []byte(strings.ToUpper(hex.EncodeToString([]byte(secret)))),
	}
	// In base64 it may begin at any of three places inside a group; the letters that its neighbours share are left out.
	for shift := range 3 {
		padded := append(make([]byte, shift), secret...)
		padded = padded[:len(padded)/3*3]
		from := (shift*8 + 5) / 6
		f[fmt.Sprintf("base64 at %d", shift)] = []byte(base64.StdEncoding.EncodeToString(padded)[from:])
		f[fmt.Sprintf("base64url at %d", shift)] = []byte(base64.URLEncoding.EncodeToString(padded)[from:])
	}
	return f
}

// search looks for many texts at once; each has at least eight bytes.
type search struct {
	begins [1 << 16]bool          // the first two bytes of a text: what most of a haystack fails at
	texts  map[[8]byte][]searched // by its first eight bytes
}

type searched struct {
	what string
	text []byte
}

func newSearch(secrets []string) *search {
	s := &search{texts: map[[8]byte][]searched{}}
	for i, secret := range secrets {
		for form, text := range forms(secret) {
			s.begins[uint(text[0])<<8|uint(text[1])] = true
			s.texts[[8]byte(text)] = append(s.texts[[8]byte(text)], searched{fmt.Sprintf("secret %d (%s)", i, form), text})
		}
	}
	return s
}

// finds lists the secrets, by number and form, that a text holds.
func (s *search) finds(text []byte) []string {
	var found []string
	for i := 0; i+8 <= len(text); i++ {
		if !s.begins[uint(text[i])<<8|uint(text[i+1])] {
			continue
		}
		for _, n := range s.texts[[8]byte(text[i:])] {
			if bytes.HasPrefix(text[i:], n.text) && !slices.Contains(found, n.what) {
				found = append(found, n.what)
			}
		}
	}
	return found
}

// evidence is everything that the outside can read of a running site, by where it is from.
func (s *site) evidence(config string, processes ...*process) map[string][]byte {
	s.t.Helper()
	all := map[string][]byte{}
	file := func(path string) {
		b, err := os.ReadFile(path)
		if err != nil {
			s.t.Errorf("%v", err)
		}
		all[path] = b
	}
	tree := func(dir string) {
		err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
			if os.IsNotExist(err) { // a running server tidies up
				return nil
			}
			if err != nil || !d.Type().IsRegular() {
				return err
			}
			b, err := os.ReadFile(path)
			if err != nil && !os.IsNotExist(err) {
				return err
			}
			all[path] = b
			return nil
		})
		if err != nil {
			s.t.Error(err)
		}
	}
	for _, p := range processes {
		file(p.log)
		if p.running() {
			file(fmt.Sprintf("/proc/%d/environ", p.pid()))
			file(fmt.Sprintf("/proc/%d/cmdline", p.pid()))
		}
	}
	tree(s.dataDir(config))
	if s.nats != nil {
		tree(s.nats.DataDir(0))
		log, err := s.nats.Log(0)
		if err != nil {
			s.t.Error(err)
		}
		all["log of NATS"] = []byte(log)
	}
	for _, args := range [][]string{
		{"status"}, {"status", "-o", "json"}, {"targets", "-o", "json"}, {"events", "--since", "all", "-o", "json"}, {"audit", "list", "--since", "all", "-o", "json"},
		{"audit", "verify", "-o", "json"}, {"plan", "-o", "json"}, {"get", string(s.pairs[0].id), "-o", "json"}, {"status", string(s.pairs[0].id), "-o", "json"},
	} {
		all["rekey "+strings.Join(args, " ")] = []byte(s.must(config, args...))
	}
	all["what commands said"] = []byte(s.said.String())
	all["log of PostgreSQL"] = s.serverLog()
	return all
}

// serverLog is what PostgreSQL logged of this site's roles: every statement.
func (s *site) serverLog() []byte {
	log, err := s.pg.Log()
	if err != nil {
		s.t.Error(err)
	}
	return []byte(log)
}

// searchForSecrets fails the test if one of the secrets, or the admin's password, is anywhere but in the store.
func (s *site) searchForSecrets(config string, secrets []string, least int, processes ...*process) {
	s.t.Helper()
	if len(secrets) < least {
		s.t.Errorf("only %d secrets were seen in the store; %d are wanted", len(secrets), least)
	}
	secrets = append(secrets, s.admin)
	size := 0
	search := newSearch(secrets)
	places := s.evidence(config, processes...)
	for where, text := range places {
		size += len(text)
		for _, f := range search.finds(text) {
			s.t.Errorf("%s holds %s", where, f)
		}
	}
	s.t.Logf("searched %d places, %d KiB, for %d secrets", len(places), size>>10, len(secrets))
}

func TestFormsOfASecretAreFound(t *testing.T) {
	t.Parallel()
	const other = "other-secret-0123456789"
	const secret = "Ab-c_defghijKLMNOPQRSTUVWXYZ0123456789_-"
	for shift := range 3 {
		text := base64.StdEncoding.EncodeToString([]byte(strings.Repeat("x", shift) + secret + "tail"))
		if len(newSearch([]string{other, secret}).finds([]byte("before "+text+" after"))) == 0 {
			t.Errorf("not found in %s", text)
		}
	}
	for _, text := range []string{secret, "x" + secret + "y", fmt.Sprintf("%x", secret), fmt.Sprintf("%X", secret), base64.RawURLEncoding.EncodeToString([]byte(secret))} {
		if len(newSearch([]string{other, secret}).finds([]byte("before "+text))) == 0 {
			t.Errorf("not found in %s", text)
		}
	}
	if f := newSearch([]string{other, secret}).finds([]byte(secret[1:] + secret[:20])); len(f) > 0 {
		t.Errorf("found in something else: %v", f)
	}
}

// TestSecretsDoNotLeak goes through every way in which a credential can change, with failures, and then searches everything that can be
// read from outside for every secret that the store has held. A canary that is put into each place shows that the search sees it.
func TestSecretsDoNotLeak(t *testing.T) {
	t.Parallel()
	took(t)
	s := newSite(t, 2)
	s.every, s.overlap = "0s", 4*time.Second // time for a rollback
	canary := "canary-" + rand.Text()
	s.env = []string{"E2E_CANARY=" + canary}
	config := s.configure("one")
	p := s.run("one", "server", config)
	s.ready(p)
	s.begin(config)
	clients := s.consume(0) // only watchers: they collect
	one, two := string(s.pairs[0].id), string(s.pairs[1].id)
	s.must(config, "rotate", one, "--wait=revoked", "--reason", canary)
	s.must(config, "rotate", one, "--wait")
	s.must(config, "rollback", one)
	s.settled(config)
	s.must(config, "replace", two, "--reason", "leak", "--yes", "--wait")
	s.settled(config)
	clients.stop() // a kill ends what consumers hold
	s.must(config, "kill", two, "--reason", "leak", "--yes", "--wait")
	s.restore(config, two)
	s.settled(config)
	s.sql("ALTER ROLE %s_adm NOCREATEROLE", s.name) // an error of the issuer, with its message
	s.must(config, "rotate", one)
	eventually(t, 60*time.Second, "the rotation is parked", func() (bool, string) {
		out := s.must(config, "status", one)
		return strings.Contains(out, "parked"), out
	})
	s.sql("ALTER ROLE %s_adm CREATEROLE", s.name)
	s.must(config, "resume", one)
	s.settled(config)

	secrets := clients.seen()
	for _, id := range s.ids() {
		secret, err := s.reader().Get(t.Context(), string(id), store.Current)
		if err != nil {
			t.Fatal(err)
		}
		password := string(secret.Material.Reveal(rotators.FieldPassword))
		secrets = append(secrets, password)
		// --reveal is the one way that shows it, and it does so without the server.
		if r := s.quietly(config, "get", string(id), "--reveal", "--field", "password"); r.out != password {
			t.Errorf("get --reveal says something else than the store")
		}
	}
	s.searchForSecrets(config, secrets, 6, p)
	pause, where := standstill(s.judge(s.ledger(config)).Entries)
	t.Logf("the longest standstill was %s: %s", pause.Round(time.Millisecond), where)
	s.verified(config)

	s.sql("SELECT '%s'", canary)
	if err := os.WriteFile(filepath.Join(s.dataDir(config), "canary"), []byte(base64.StdEncoding.EncodeToString([]byte("x"+canary))), 0o600); err != nil {
		t.Fatal(err)
	}
	found := map[string]bool{}
	for where, text := range s.evidence(config, p) {
		if len(newSearch([]string{canary}).finds(text)) > 0 {
			found[where] = true
		}
	}
	nats := false
	for where := range found {
		nats = nats || strings.HasPrefix(where, filepath.Join(s.dataDir(config), "nats", "store"))
	}
	for _, where := range []string{fmt.Sprintf("/proc/%d/environ", p.pid()), filepath.Join(s.dataDir(config), "canary"), "rekey audit list --since all -o json", "log of PostgreSQL"} {
		if !found[where] {
			t.Errorf("the search does not see the canary in %s", where)
		}
	}
	if !nats {
		t.Error("the search does not see the canary in the files of NATS")
	}
}

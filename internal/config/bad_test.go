package config_test

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/rekeyhq/rekey/internal/config"
	"github.com/rekeyhq/rekey/internal/credential"
)

// file is valid; each bad input is made from it by one replacement.
const file = `version: 1
stores:
  default:
    kind: file
    dir: ./secrets
    identity: file:./identity.txt
targets:
  orders-db:
    kind: postgres
    environment: production
    owner: team-orders
    host: localhost
    admin:
      username: admin
      password: file:./admin
credentials:
  orders/db:
    target: orders-db
    owner: team-orders
    environment: production
    purpose: the order service
    every: 1d
    roles: [orders_a, orders_b]
    owner_role: orders_owner
`

const plaintext = "want a reference to a secret, not the secret itself; fix: put the secret into a file (chmod 600) and write file:/path/to/it here, or env:NAME"

func TestBadInput(t *testing.T) {
	const idRule = "want team/name, each of 1 to 63 characters a-z 0-9 _ - that begins and ends with a letter or digit"
	long := strings.Repeat("a", 300)
	second := func(id, target, roles string) string {
		return file + "  " + id + ": {target: " + target + ", owner: team-orders, environment: production, purpose: p, every: 1d, owner_role: o, roles: " + roles + "}\n"
	}
	replaced := func(old, new string) string {
		if !strings.Contains(file, old) {
			t.Fatalf("%q is not in the file", old)
		}
		return strings.Replace(file, old, new, 1)
	}
	for _, c := range []struct {
		name string
		text string
		want []string // every problem, without the file's name
	}{
		{"valid", file, nil},
		{"id with a dot", replaced("orders/db:", "orders/d.b:"), []string{`:17:3: credentials.orders/d.b: id "orders/d.b": ` + idRule}},
		{"id with a wildcard", replaced("orders/db:", `"orders/*":`), []string{`:17:3: credentials.orders/*: id "orders/*": ` + idRule}},
		{"id with >", replaced("orders/db:", `"orders/>":`), []string{`:17:3: credentials.orders/>: id "orders/>": ` + idRule}},
		{"id of 300 characters", replaced("orders/db:", long+"/db:"), []string{`:17:3: credentials.` + long[:80] + `…: id "` + long[:80] + `…": ` + idRule}},
		{"id without team", replaced("orders/db:", "db:"), []string{`:17:3: credentials.db: id "db": ` + idRule}},
		{"id in capitals", replaced("orders/db:", "Orders/db:"), []string{`:17:3: credentials.Orders/db: id "Orders/db": ` + idRule}},
		{"target's name", strings.ReplaceAll(file, "orders-db", "orders.db"), []string{`:8:3: targets.orders.db: name: want 1 to 63 characters a-z 0-9 _ - that begin and end with a letter or digit`,
			`:18:5: credentials.orders/db.target: "orders.db": want 1 to 63 characters a-z 0-9 _ -`}},
		{"unknown key with a suggestion", replaced("every: 1d", "evry: 1d"), []string{`:22:5: credentials.orders/db.evry: unknown key; fix: did you mean every?`}},
		{"unknown key at the top", file + "targts: {}\n", []string{`:25:1: targts: unknown key; fix: did you mean targets?`}},
		{"unknown key of the provider", replaced("username: admin", "username: admin\n      sslmode: off"), []string{`:15:7: targets.orders-db.admin.sslmode: unknown key; fix: known here: username, password`}},
		{"duplicate key", replaced("every: 1d", "every: 1d\n    every: 2d"), []string{`:23:5: credentials.orders/db.every: the key occurs twice, first at line 22; fix: remove one of the two`}},
		{"duplicate credential", file + "  orders/db: {}\n", []string{`:25:3: credentials.orders/db: the key occurs twice, first at line 17; fix: remove one of the two`}},
		{"duration as a number", replaced("every: 1d", "every: 24"), []string{`:22:12: credentials.orders/db.every: want text, not a number; fix: write a number with a unit, such as 90s, 12h or 30d`}},
		{"duration without a unit", replaced("every: 1d", `every: "24"`), []string{`:22:12: credentials.orders/db.every: "24": want a duration: a number with a unit, such as 90s, 12h or 30d`}},
		{"negative duration", replaced("every: 1d", "every: -1h"), []string{`:22:12: credentials.orders/db.every: "-1h": want a duration: a number with a unit, such as 90s, 12h or 30d`}},
		{"duration past all bounds", replaced("every: 1d", "every: 9999999999h"), []string{`:22:12: credentials.orders/db.every: "9999999999h": not a duration that can be counted; fix: 0s is none`}},
		{"list for a mapping", replaced("    admin:\n      username: admin\n      password: file:./admin", "    admin: [a]"), []string{`:13:12: targets.orders-db.admin: want a mapping, not a list`}},
		{"text for a list", replaced("[orders_a, orders_b]", "orders_a"), []string{`:23:12: credentials.orders/db.roles: want a list, not text`}},
		{"number for a text", replaced("host: localhost", "host: 5"), []string{`:12:11: targets.orders-db.host: want text, not a number; fix: put it between quotes`}},
		{"empty value", replaced("every: 1d", "every:"), []string{`:22:11: credentials.orders/db.every: want text, not an empty value; fix: write a number with a unit, such as 90s, 12h or 30d`}},
		{"out of range", replaced("host: localhost", "host: localhost\n    port: 70000"), []string{`:13:11: targets.orders-db.port: maximum: got 70,000, want 65,535`}},
		{"fraction for a whole number", replaced("host: localhost", "host: localhost\n    port: 1.5"), []string{`:13:11: targets.orders-db.port: want a whole number, not a number`}},
		{"wrong choice", replaced("host: localhost", "host: localhost\n    tls: {mode: verify-ful}"), []string{`:13:17: targets.orders-db.tls.mode: "verify-ful": want verify-full, disable; fix: did you mean verify-full?`}},
		{"version of tomorrow", replaced("version: 1", "version: 2"), []string{`:1:10: version: 2: want 1`}},
		{"no version", replaced("version: 1\n", ""), []string{`:1:1: version: missing; fix: add version: — Version of this file's format: 1`}},
		{"missing owner", replaced("    target: orders-db\n    owner: team-orders\n", "    target: orders-db\n"), []string{`:17:3: credentials.orders/db.owner: missing; fix: add owner: — Team that answers for it; the target's`}},
		{"blank owner", strings.ReplaceAll(file, "owner: team-orders", `owner: " "`), []string{`:11:12: targets.orders-db.owner: is blank`}},
		{"blank purpose", replaced("purpose: the order service", `purpose: " "`), []string{`:21:5: credentials.orders/db.purpose: missing; every credential has one`}},
		{"empty purpose", replaced("purpose: the order service", `purpose: ""`), []string{`:21:14: credentials.orders/db.purpose: is empty`}},
		{"no interval", replaced("    every: 1d\n", ""), []string{`:17:3: credentials.orders/db.every: missing; fix: say every: 30d here or under defaults, or every: 0s to rotate only on request`}},
		{"interval too short", replaced("every: 1d", "every: 1s"), []string{`:22:5: credentials.orders/db.every: 1s: the least interval is 2s`}},
		{"overlap not shorter than the interval", replaced("every: 1d", "every: 1h\n    overlap: {min: 1h}"), []string{`:23:15: credentials.orders/db.overlap.min: 1h: must be shorter than every 1h, or the overlap would never end before the next rotation`}},
		{"overlap's ends crossed", replaced("every: 1d", "every: 1d\n    overlap: {min: 2h, max: 1h}"), []string{`:23:24: credentials.orders/db.overlap.max: 1h: shorter than overlap.min 2h`}},
		{"jitter too long", replaced("every: 1d", "every: 1d\n    jitter: 2d"), []string{`:23:13: credentials.orders/db.jitter: 2d: must be shorter than every 1d`}},
		{"unknown target", replaced("target: orders-db", "target: order-db"), []string{`:18:13: credentials.orders/db.target: there is no target "order-db"; fix: did you mean orders-db?`}},
		{"unknown store", replaced("every: 1d", "every: 1d\n    store: vault"), []string{`:23:12: credentials.orders/db.store: there is no store "vault"; fix: add it under stores:`}},
		{"unknown kind", replaced("kind: postgres", "kind: postgre"), []string{`:9:11: targets.orders-db.kind: "postgre": there is no such kind; fix: did you mean postgres?`}},
		{"unknown kind of store", replaced("kind: file", "kind: vaultkv"), []string{`:4:11: stores.default.kind: "vaultkv": there is no such kind; fix: known: file`}},
		{"no kind", replaced("    kind: postgres\n", ""), []string{`:8:3: targets.orders-db.kind: missing; fix: add kind: one of postgres`}},
		{"another team's target", replaced("target: orders-db\n    owner: team-orders", "target: orders-db\n    owner: team-billing"), []string{`:19:12: credentials.orders/db.owner: "team-billing", but target orders-db has "team-orders": a credential may only use a target of its own owner`}},
		{"another environment's target", replaced("    environment: production\n    purpose", "    environment: staging\n    purpose"), []string{`:20:18: credentials.orders/db.environment: "staging", but target orders-db has "production": a credential may only use a target of its own environment`}},
		{"one role claimed twice", second("orders/other", "orders-db", "[orders_b, orders_c]"), []string{`:25:3: credentials.orders/other: claims role/orders_b, which orders/db (line 17) claims already at the same issuer; fix: give each credential its own`}},
		{"one role claimed through two targets", second("orders/other", "alias", "[orders_b, orders_c]") + "# \n" + "", nil},
		{"plaintext password", replaced("password: file:./admin", "password: hunter2-canary"), []string{`:15:17: targets.orders-db.admin.password: ` + plaintext}},
		{"plaintext password that is a number", replaced("password: file:./admin", "password: 771133"), []string{`:15:17: targets.orders-db.admin.password: ` + plaintext}},
		{"plaintext in adopt", replaced("every: 1d", "every: 1d\n    adopt: {version: orders_a, material: {password: hunter2-canary}}"), []string{`:23:53: credentials.orders/db.adopt.material.password: ` + plaintext}},
		{"env reference with a bad name", replaced("password: file:./admin", "password: env:A-B"), []string{`:15:17: targets.orders-db.admin.password: ` + plaintext}},
		{"adopt of a stranger", replaced("every: 1d", "every: 1d\n    adopt: {version: orders_x, material: {password: env:P}}"), []string{`:23:22: credentials.orders/db.adopt.version: "orders_x" is not one of the versions that this credential may have: orders_a, orders_b`}},
		{"one slot without allow_gap", replaced("[orders_a, orders_b]", "[orders_a]"), []string{`:17:3: credentials.orders/db: the issuer holds one version at a time, so each rotation has a moment in which no stored secret works: say allow_gap: true to accept that, or give it a second slot`}},
		{"provider's own rule", replaced("    owner_role: orders_owner\n", ""), []string{`:17:3: credentials.orders/db: owner_role: missing; two roles need one`}},
		{"provider's own rules on a target", replaced("host: localhost", "host: nowhere\n    tls: {mode: disable}"), []string{
			`:12:5: targets.orders-db.host: "nowhere": is not a host`, `:13:11: targets.orders-db.tls.mode: disable: the host is on a network`}},
		{"between target and credential", replaced("orders_a, ", "admin, "), []string{`:23:5: credentials.orders/db.roles: one of them is the admin`}},
		{"consumer twice", replaced("every: 1d", "every: 1d\n    consumers: [{name: a}, {name: a}]"), []string{`:17:3: credentials.orders/db: consumer "a": want a unique name of a-z 0-9 _ -`}},
		{"listening to the world", file + "server: {listen: '0.0.0.0:8200'}\n", []string{`:25:18: server.listen: the API has no TLS of its own, so it listens on this machine only; fix: listen on 127.0.0.1, or on a unix socket`}},
		{"listen without a port", file + "server: {listen: localhost}\n", []string{`:25:18: server.listen: want unix:/path or 127.0.0.1:port`}},
		{"socket too long", file + "server: {listen: 'unix:/" + long + "'}\n", []string{`:25:18: server.listen: the path of the unix socket is longer than the 103 bytes that systems accept: /` + long + `; fix: set server.listen to a shorter one, such as unix:/run/rekey/api.sock`}},
		{"password in the NATS URL", file + "nats: {url: 'nats://u:hunter2-canary@h:4222'}\n", []string{`:25:13: nats.url: holds a user or a password; fix: use nats.creds: file:/path/to/engine.creds`}},
		{"bad NATS URL", file + "nats: {url: 'http://h hunter2-canary'}\n", []string{`:25:13: nats.url: want nats://host:4222 or tls://host:4222, several joined by commas`}},
		{"replicas of an embedded server", file + "nats: {replicas: 3}\n", []string{`:25:8: nats.replicas: only counts with nats.url`}},
		{"port of an external server", file + "nats: {url: 'nats://h:4222', port: 4222}\n", []string{`:25:30: nats.port: only counts without nats.url`}},
		{"section that is a list", replaced("stores:\n  default:\n    kind: file\n    dir: ./secrets\n    identity: file:./identity.txt\n", "stores: []\n"), []string{
			`:2:9: stores: want a mapping, not a list`, `:13:3: credentials.orders/db.store: there is no store "default"; fix: add it under stores:`}},
		{"target that is text", replaced("targets:\n", "targets:\n  other: text\n"), []string{`:8:10: targets.other: want a mapping, not text`}},
		{"two documents", file + "---\nversion: 1\n", []string{`:26:1: a second document; a configuration is one document; fix: keep one and remove the --- lines`}},
		{"a list at the top", "- a\n", []string{`:1:1: want a mapping at the top, not a list; fix: begin with version: 1`}},
		{"a tag", replaced("every: 1d", "every: !!str 1d"), []string{`:22:12: credentials.orders/db.every: YAML tags are not supported; fix: remove it; quote a value that must be text`}},
		{"not UTF-8", "version: \xff\n", []string{`: the file is not UTF-8 text; fix: save it as UTF-8`}},
		{"everything at once", strings.NewReplacer("dir: ./secrets", "dri: ./secrets", "password: file:./admin", "password: hunter2-canary", "every: 1d", "every: 1x", "purpose: the order service", "colour: blue").Replace(file), []string{
			`:3:3: stores.default.dir: missing; fix: add dir: — Directory of the files`,
			`:5:5: stores.default.dri: unknown key; fix: did you mean dir?`,
			`:15:17: targets.orders-db.admin.password: ` + plaintext,
			`:17:3: credentials.orders/db.purpose: missing; fix: add purpose: — What it is used for, for whoever has to decide about it one day`,
			`:21:5: credentials.orders/db.colour: unknown key; fix: known here: target, store, owner, environment, purpose, labels, every, jitter, overlap, allow_gap, step_deadline, consumers, adopt, owner_role, roles`,
			`:22:12: credentials.orders/db.every: "1x": want a duration: a number with a unit, such as 90s, 12h or 30d`}},
	} {
		t.Run(c.name, func(t *testing.T) {
			if c.name == "one role claimed through two targets" {
				c.text = strings.Replace(c.text, "targets:\n", "targets:\n  alias: {kind: postgres, environment: production, owner: team-orders, host: localhost, admin: {username: b, password: env:B}}\n", 1)
				c.want = []string{`:26:3: credentials.orders/other: claims role/orders_b, which orders/db (line 18) claims already at the same issuer; fix: give each credential its own`}
			}
			check(t, c.text, c.want)
		})
	}
}

func check(t *testing.T, text string, want []string) {
	t.Helper()
	got, err := config.Parse("rekey.yaml", []byte(text), fakeKinds())
	if want == nil {
		if err != nil {
			t.Errorf("refused: %v", err)
		}
		return
	}
	var ps config.Problems
	if !errors.As(err, &ps) {
		t.Fatalf("want problems, got %v", err)
	}
	if len(got.Credentials) != 0 || len(got.Targets) != 0 {
		t.Error("a refused file must give nothing to work with")
	}
	var full []string
	for _, w := range want {
		full = append(full, "rekey.yaml"+w)
	}
	if ps.Error() != strings.Join(full, "\n") {
		t.Errorf("got\n%s\nwant\n%s", ps, strings.Join(full, "\n"))
	}
	for _, canary := range []string{"hunter2", "771133"} {
		if strings.Contains(ps.Error(), canary) {
			t.Errorf("a secret is in the error: %s", ps)
		}
	}
}

// A file that was made to exhaust the reader is refused quickly.
func TestBombs(t *testing.T) {
	laughs := "a: &a [x,x,x,x,x,x,x,x,x,x]\n"
	for c := 'b'; c < 'k'; c++ {
		p := string(c - 1)
		laughs += string(c) + ": &" + string(c) + " [*" + strings.Repeat(p+",*", 9) + p + "]\n"
	}
	indents := ""
	for i := range 2000 {
		indents += strings.Repeat(" ", i) + "a:\n"
	}
	for name, c := range map[string]struct{ text, want string }{
		"billion laughs":  {laughs, "more than 500000 values once aliases are expanded"},
		"flow nesting":    {"a: " + strings.Repeat("[", 1<<18), "nested deeper than 32 levels"},
		"flow mappings":   {"a: " + strings.Repeat("{a: ", 1<<15), "nested deeper than 32 levels"},
		"list in list":    {strings.Repeat("- ", 1<<18) + "a", "nested deeper than 32 levels"},
		"complex keys":    {strings.Repeat("? ", 1<<18) + "a", "nested deeper than 32 levels"},
		"indentation":     {indents, "indented by more than 256 columns"},
		"block nesting":   {indents[:20000], "nested deeper than 32 levels"},
		"anchors":         {strings.Repeat("&a ", 1<<15) + "x", "more than 1000 anchors, aliases and tags"},
		"anchors by line": {strings.Repeat("&a\n", 1<<15) + "x", "more than 1000 anchors, aliases and tags"},
		"tags":            {strings.Repeat("!!a ", 1<<15) + "x", "more than 1000 anchors, aliases and tags"},
		"self-reference":  {"a: &a [*a]\n", "there is no such anchor before it"},
		"one long line":   {"a: " + strings.Repeat("x", config.MaxFileSize-10) + "\n", "unknown key"},
		"many keys":       {strings.Repeat("a: 1\n", 40_000), "too many keys side by side"},
		"quotes":          {"a: \"" + strings.Repeat("\\\"", 1<<18), "not valid YAML"},
		"many comments":   {strings.Repeat("#\n", 1<<18), "the file is empty"},
		"many documents":  {strings.Repeat("---\n", 1<<17) + "a: 1", "too many keys side by side"},
		"long key":        {strings.Repeat("k", 1<<18) + ": 1", "unknown key"},
	} {
		t.Run(name, func(t *testing.T) {
			began := time.Now()
			_, err := config.Parse("rekey.yaml", []byte(c.text), fakeKinds())
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("%.300v, want %q", err, c.want)
			}
			t.Logf("%d bytes in %s", len(c.text), time.Since(began))
			if d := time.Since(began); d > 20*time.Second {
				t.Errorf("took %s", d)
			}
		})
	}
}

// Thousands of credentials are an ordinary file, far from the limits.
func TestManyCredentials(t *testing.T) {
	var b strings.Builder
	b.WriteString(strings.Replace(file, "every: 1d", "every: 1h", 1))
	for i := range 3_000 {
		fmt.Fprintf(&b, "  orders/c%d: {target: orders-db, owner: team-orders, environment: production, purpose: p, every: 1d, owner_role: o, roles: [a%d, b%d]}\n", i, i, i)
	}
	began := time.Now()
	c, err := config.Parse("rekey.yaml", []byte(b.String()), fakeKinds())
	if err != nil || len(c.Credentials) != 3_001 {
		t.Errorf("%d credentials, %.300v", len(c.Credentials), err)
	}
	t.Logf("%d bytes in %s", b.Len(), time.Since(began))
}

func FuzzParse(f *testing.F) {
	f.Add(file)
	f.Add(string(config.Template()))
	for _, s := range []string{
		"", "version: 1\nstores: {}\n", "a: &a [*a]\n", "<<: {a: 1}\n", "? [a]\n: b\n", "- - - a\n", "a: |\n  text\n", "version: 0x1\ntargets: {a: {kind: postgres}}",
		"version: .inf\n", "a: \"\\u0000\"\n", "{a: {b: [c, {d: e}]}}\n", "a: !!binary x\n", "%YAML 1.2\n---\na: 1\n", "credentials: {a/b: {target: orders-db, adopt: {material: {p: 1}}}}\n", "\xef\xbb\xbfversion: 1\n",
	} {
		f.Add(s)
		f.Add(file + s)
	}
	f.Fuzz(func(t *testing.T, text string) {
		c, err := config.Parse("rekey.yaml", []byte(text), fakeKinds())
		var ps config.Problems
		switch {
		case err == nil:
			for id, s := range c.Credentials {
				if _, bad := credential.ParseID(string(id)); bad != nil || s.Validate() != nil || s.Owner == "" {
					t.Errorf("accepted an invalid credential %q: %v %v", id, bad, s.Validate())
				}
			}
		case !errors.As(err, &ps) || len(ps) == 0:
			t.Errorf("not a list of problems: %v", err)
		default:
			lines := strings.Count(text, "\n") + strings.Count(text, "\r") + 1
			for _, p := range ps {
				if p.Message == "" || p.Line < 0 || p.Line > lines {
					t.Errorf("a problem without a message or outside the file of %d lines: %+v", lines, p)
				}
			}
		}
	})
}

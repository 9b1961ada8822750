package config_test

import (
	"encoding/json"
	"strings"
	"testing"

	"github.com/rekeyhq/rekey/internal/config"
	"github.com/rekeyhq/rekey/internal/credential"
)

func parsed(t *testing.T, text string) config.Config {
	t.Helper()
	c, err := config.Parse("/etc/rekey/rekey.yaml", []byte(text), fakeKinds())
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func TestPlan(t *testing.T) {
	base := parsed(t, file)
	spec := base.Credentials["orders/db"]
	live := &credential.Version{ID: "orders_a", Generation: 1}
	record := func(change func(*credential.Record)) []credential.Record {
		r := credential.Record{ID: "orders/db", Rev: 3, Generation: 1, Spec: spec, Plan: credential.Overlapping, Managed: true, Phase: credential.Idle, Current: live}
		if change != nil {
			change(&r)
		}
		return []credential.Record{r}
	}
	with := func(replacements ...string) config.Config {
		return parsed(t, strings.NewReplacer(replacements...).Replace(file))
	}
	without := base
	without.Credentials = nil
	bare := without
	bare.Targets = nil
	const move = "declare it under a new id, let consumers move, then remove this one"
	other := "targets:\n  other: {kind: postgres, environment: production, owner: team-orders, host: h, admin: {username: b, password: env:B}}\n"

	for _, c := range []struct {
		name    string
		current []credential.Record
		targets []credential.Target
		desired config.Config
		want    []string
	}{
		{"everything is new", nil, nil, base, []string{"+ target orders-db: create", "+ credential orders/db: create"}},
		{"nothing differs", record(nil), base.Targets, base, []string{"  target orders-db: none", "  credential orders/db: none"}},
		{"adoption", nil, base.Targets, with("every: 1d", "every: 1d\n    adopt: {version: orders_a, material: {password: env:P}}"),
			[]string{"  target orders-db: none", "+ credential orders/db: adopt: orders_a stays as it is and is published to store default"}},
		{"adoption counts once", record(nil), base.Targets, with("every: 1d", "every: 1d\n    adopt: {version: orders_a, material: {password: env:P}}"),
			[]string{"  target orders-db: none", "  credential orders/db: none"}},
		{"fields", record(nil), base.Targets, with("every: 1d", "every: 2d\n    labels: {tier: gold}", "owner_role: orders_owner", "owner_role: o2", "host: localhost", "host: db"),
			[]string{"~ target orders-db: update\n    fields.host: \"localhost\" -> \"db\"",
				"~ credential orders/db: update\n    every: \"1d\" -> \"2d\"\n    fields.owner_role: \"orders_owner\" -> \"o2\"\n    labels.tier: \"gold\" (new)\n    overlap.max: \"12h\" -> \"1d\""}},
		{"a field goes", record(func(r *credential.Record) { r.Spec.Labels = map[string]string{"tier": "gold"} }), base.Targets, base,
			[]string{"  target orders-db: none", "~ credential orders/db: update\n    labels.tier: \"gold\" (removed)"}},
		{"an update during a rotation", record(func(r *credential.Record) { r.Phase = credential.Draining }), base.Targets, with("every: 1d", "every: 2d"),
			[]string{"  target orders-db: none", "~ credential orders/db: update\n    every: \"1d\" -> \"2d\"\n    overlap.max: \"12h\" -> \"1d\""}},
		{"it leaves", record(nil), base.Targets, without,
			[]string{"  target orders-db: none", "- credential orders/db: unmanage: it stops rotating; nothing is revoked or deleted"}},
		{"it leaves during a rotation", record(func(r *credential.Record) { r.Phase = credential.Proving }), base.Targets, without,
			[]string{"  target orders-db: none", `- credential orders/db: unmanage: the rotation that is at "proving" is finished first; then it stops rotating; nothing is revoked or deleted`}},
		{"it left before", record(func(r *credential.Record) { r.Managed = false }), base.Targets, without,
			[]string{"  target orders-db: none", "  credential orders/db: none: unmanaged already"}},
		{"it is back", record(func(r *credential.Record) { r.Managed = false }), base.Targets, base,
			[]string{"  target orders-db: none", "+ credential orders/db: manage"}},
		{"its target leaves too", record(nil), base.Targets, bare,
			[]string{"  target orders-db: keep: orders/db has live versions there", "- credential orders/db: unmanage: it stops rotating; nothing is revoked or deleted"}},
		{"an unused target leaves", nil, base.Targets, bare, []string{"- target orders-db: remove"}},
		{"another target in the middle of a rotation", record(func(r *credential.Record) { r.Phase, r.Current = credential.Applying, nil }), base.Targets,
			with("targets:\n", other, "target: orders-db", "target: other"),
			[]string{"  target orders-db: none", "+ target other: create", "! credential orders/db: refused: its versions live at target orders-db, so it cannot change to other: " + move}},
		{"another target while a version lives", record(nil), base.Targets, with("targets:\n", other, "target: orders-db", "target: other"),
			[]string{"  target orders-db: none", "+ target other: create", "! credential orders/db: refused: its versions live at target orders-db, so it cannot change to other: " + move}},
		{"another target before the first version", record(func(r *credential.Record) { r.Current, r.Generation = nil, 0 }), base.Targets, with("targets:\n", other, "target: orders-db", "target: other"),
			[]string{"  target orders-db: none", "+ target other: create", "~ credential orders/db: update\n    target: \"orders-db\" -> \"other\""}},
		{"another store", record(nil), base.Targets, with("every: 1d", "every: 1d\n    store: second", "stores:\n", "stores:\n  second: {kind: file, dir: x, identity: env:I}\n"),
			[]string{"  target orders-db: none", "! credential orders/db: refused: consumers read it in store default, so it cannot change to second: " + move}},
		{"a role in use is no longer declared", record(nil), base.Targets, with("[orders_a, orders_b]", "[orders_b, orders_c]"),
			[]string{"  target orders-db: none", `! credential orders/db: refused: "orders_a" is in use and would no longer be one of its versions (orders_b, orders_c): keep it declared, or ` + move}},
		{"a killed role is no longer declared", record(func(r *credential.Record) {
			r.Phase, r.Current, r.Dead = credential.Suspended, nil, []credential.Version{*live}
		}), base.Targets, with("[orders_a, orders_b]", "[orders_b, orders_c]"),
			[]string{"  target orders-db: none", `! credential orders/db: refused: "orders_a" is in use and would no longer be one of its versions (orders_b, orders_c): keep it declared, or ` + move}},
		{"the free role is replaced", record(nil), base.Targets, with("[orders_a, orders_b]", "[orders_a, orders_c]"),
			[]string{"  target orders-db: none", "~ credential orders/db: update\n    fields.roles: [\"orders_a\",\"orders_b\"] -> [\"orders_a\",\"orders_c\"]"}},
		{"another plan in the middle of a rotation", record(func(r *credential.Record) { r.Phase = credential.Draining }), base.Targets,
			with("[orders_a, orders_b]", "[orders_a]\n    allow_gap: true"),
			[]string{"  target orders-db: none", `! credential orders/db: refused: the plan would change from overlap to in-place in the middle of a rotation (draining): apply again once it is idle`}},
		{"another kind", record(nil), func() []credential.Target {
			t := base.Targets[0]
			t.Kind = "mysql"
			return []credential.Target{t}
		}(), base, []string{"! target orders-db: refused: its kind would change from mysql to postgres while orders/db has live versions there; declare a new target under another name", "  credential orders/db: none"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			before, _ := json.Marshal(c.current)
			var got []string
			changes := config.Plan(c.current, c.targets, c.desired)
			for _, ch := range changes {
				got = append(got, ch.String())
			}
			if g, w := strings.Join(got, "\n"), strings.Join(c.want, "\n"); g != w {
				t.Errorf("got\n%s\nwant\n%s", g, w)
			}
			if after, _ := json.Marshal(c.current); string(before) != string(after) {
				t.Error("Plan changed a record")
			}
			if b, err := json.Marshal(changes); err != nil || !json.Valid(b) {
				t.Error(err)
			}
		})
	}
}

// Applying the same file twice changes nothing, in whatever order its maps are read.
func TestPlanIsStable(t *testing.T) {
	text := string(config.Template())
	first := parsed(t, text)
	var records []credential.Record
	for id, s := range first.Credentials {
		b, err := json.Marshal(s) // as the ledger keeps it
		if err != nil {
			t.Fatal(err)
		}
		var kept credential.Spec
		if err := json.Unmarshal(b, &kept); err != nil {
			t.Fatal(err)
		}
		records = append(records, credential.Record{ID: id, Spec: kept, Plan: credential.Overlapping, Managed: true, Phase: credential.Idle})
	}
	for _, ch := range config.Plan(records, first.Targets, parsed(t, text)) {
		if ch.Action != config.None {
			t.Errorf("%s", ch)
		}
	}
}

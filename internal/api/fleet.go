package api

import (
	"context"
	"maps"
	"slices"
	"sync"

	"github.com/rekeyhq/rekey/internal/credential"
)

// fleet is the inventory in memory, fed by the ledger's watch: what lists, counts and suggestions are made from. It may be some
// milliseconds behind; a single credential is always read from the ledger.
type fleet struct {
	mu      sync.RWMutex
	records map[credential.ID]credential.Record
	loaded  chan struct{} // closed once everything that existed has been seen
	once    sync.Once
}

func newFleet() *fleet {
	return &fleet{records: map[credential.ID]credential.Record{}, loaded: make(chan struct{})}
}

// put takes over a record, unless a later one is known.
func (f *fleet) put(r credential.Record) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if have, ok := f.records[r.ID]; ok && have.Incarnation == r.Incarnation && have.Rev > r.Rev {
		return
	}
	f.records[r.ID] = r
}

func (f *fleet) ready() { f.once.Do(func() { close(f.loaded) }) }

func (f *fleet) isReady() bool {
	select {
	case <-f.loaded:
		return true
	default:
		return false
	}
}

// wait returns once the inventory is complete, or with ctx's error.
func (f *fleet) wait(ctx context.Context) error {
	select {
	case <-f.loaded:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// all returns every record, by id.
func (f *fleet) all() []credential.Record {
	f.mu.RLock()
	defer f.mu.RUnlock()
	ids := slices.Sorted(maps.Keys(f.records))
	out := make([]credential.Record, len(ids))
	for i, id := range ids {
		out[i] = f.records[id]
	}
	return out
}

// each calls fn with every record, in no order.
func (f *fleet) each(fn func(credential.Record)) {
	f.mu.RLock()
	defer f.mu.RUnlock()
	for _, r := range f.records {
		fn(r)
	}
}

// near lists up to three ids that id was probably meant to be, the likeliest first, among those that see allows.
func (f *fleet) near(id credential.ID, see func(team string) bool) []credential.ID {
	type guess struct {
		id credential.ID
		d  int
	}
	var guesses []guess
	f.each(func(r credential.Record) {
		if !see(r.ID.Team()) {
			return
		}
		d := distance(string(id), string(r.ID))
		if r.ID.Name() == id.Name() {
			d = min(d, 1) // the right name in another team
		}
		if d <= max(2, len(id)/4) {
			guesses = append(guesses, guess{r.ID, d})
		}
	})
	slices.SortFunc(guesses, func(a, b guess) int {
		if a.d != b.d {
			return a.d - b.d
		}
		return slices.Compare([]byte(a.id), []byte(b.id))
	})
	var ids []credential.ID
	for _, g := range guesses[:min(3, len(guesses))] {
		ids = append(ids, g.id)
	}
	return ids
}

// distance is Levenshtein's.
func distance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := diagonal
			if a[i] != b[j] {
				cost++
			}
			diagonal = row[j+1]
			row[j+1] = min(cost, row[j]+1, row[j+1]+1)
		}
	}
	return row[len(b)]
}

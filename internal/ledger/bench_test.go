package ledger_test

import (
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/rekeyhq/rekey/internal/credential"
	"github.com/rekeyhq/rekey/internal/ledger"
	"github.com/rekeyhq/rekey/internal/ledger/ledgertest"
)

// BenchmarkCommit measures durable transitions (record, event, audit entry, schedule) on the embedded server, with SyncAlways.
func BenchmarkCommit(b *testing.B) {
	for _, writers := range []int{1, 8, 100} {
		b.Run(fmt.Sprintf("writers=%d", writers), func(b *testing.B) {
			e, err := ledger.StartEmbedded(ledger.EmbeddedConfig{DataDir: b.TempDir()})
			if err != nil {
				b.Fatal(err)
			}
			defer e.Shutdown()
			l := open(b, ledger.Config{Conn: connect(b, e)})
			due := time.Now().Add(24 * time.Hour)
			var wg sync.WaitGroup
			b.ResetTimer()
			for w := range writers {
				wg.Go(func() {
					r := ledgertest.New(l.Incarnation(), credential.ID(fmt.Sprintf("pay/c%d", w)))
					var seq uint64
					for i := w; i < b.N; i += writers {
						var err error
						if seq, err = l.Commit(b.Context(), r, seq); err != nil {
							b.Error(err)
							return
						}
						r = ledgertest.Next(r, due, credential.NoticeRotated)
					}
				})
			}
			wg.Wait()
			b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "commits/s")
		})
	}
}

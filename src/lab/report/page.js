'use strict';
(() => {
  const data = JSON.parse(document.getElementById('data').textContent);
  const rows = data.rows;
  const $ = (id) => document.getElementById(id);
  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  // Distinct for colour-blind readers too (Okabe and Ito), dense in the text's own colour.
  const palette = ['#0072b2', '#d55e00', '#009e73', '#cc79a7', '#e69f00', '#56b4e9', '#8c6bb1', '#a6761d', '#666f7a', '#b2182b'];
  const colour = (i) => i === 0 ? css('--ink') : palette[(i - 1) % palette.length];
  const levels = '0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz';
  const level = (text, i) => levels.indexOf(text[i]) / (levels.length - 1);

  const size = (bytes) => {
    const units = ['B', 'KiB', 'MiB', 'GiB', 'TiB'];
    let u = 0;
    while (bytes >= 1024 && u + 1 < units.length) { bytes /= 1024; ++u; }
    return bytes.toFixed(u && bytes < 100 ? 1 : 0) + ' ' + units[u];
  };
  const el = (tag, props, ...children) => {
    const e = Object.assign(document.createElement(tag), props || {});
    e.append(...children);
    return e;
  };

  $('about').textContent = `${data.model} on ${data.text}: ${data.prompt.toLocaleString('en')} tokens prefilled, ` +
    `${data.scored.toLocaleString('en')} fed one by one and scored. ${data.machine}.`;

  function table() {
    const columns = [
      ['prefill t/s', (r) => r.prefill_tps, (x) => x.toFixed(0), 1],
      ['decode t/s', (r) => r.decode_tps, (x) => x.toFixed(1), 1],
      ['KV', (r) => r.kv_bytes, size, -1],
      ['peak KV', (r) => r.peak_bytes, size, -1],
      ['density', (r) => r.density, (x) => x.toFixed(3), -1],
      ['perplexity', (r) => r.ppl, (x) => x.toFixed(3), -1],
      ['KLD', (r) => r.kld_mean, (x) => x.toFixed(4), -1],
      ['KLD 99 %', (r) => r.kld_p99, (x) => x.toFixed(3), -1],
      ['top-1', (r) => r.top1_agree, (x) => (100 * x).toFixed(1) + ' %', 1],
      ['mass, prefill', (r) => r.mass_prefill, (x) => x.toFixed(3), 1],
      ['mass, decode', (r) => r.mass_decode, (x) => x.toFixed(3), 1],
    ];
    for (const task of Object.keys(rows[0].tasks))
      columns.push([task, (r) => r.tasks[task] ? r.tasks[task].accuracy : NaN, (x) => (100 * x).toFixed(0) + ' %', 1]);
    const head = el('tr', null, el('th', { textContent: 'attention' }), ...columns.map((c) => el('th', { textContent: c[0] })));
    const body = rows.map((row, i) => {
      const dot = el('span', { className: 'dot' });
      dot.style.background = colour(i);
      const name = el('td', { title: row.attention }, dot, row.attention + (row.not_exercised ? ' *' : ''));
      return el('tr', null, name, ...columns.map(([, get, show, sign]) => {
        const others = rows.slice(1).map(get).filter(Number.isFinite);
        const top = sign > 0 ? Math.max(...others) : Math.min(...others);
        const best = i > 0 && get(row) === top && others.length > 1 && others.filter((x) => x === top).length <= others.length / 2;
        const x = get(row);
        return el('td', { textContent: Number.isFinite(x) ? show(x) : '', className: best ? 'best' : '' });
      }));
    });
    $('table').replaceChildren(el('thead', null, head), el('tbody', null, ...body));
    const idle = rows.filter((r) => r.not_exercised);
    $('idle').textContent = idle.length ? '* not exercised, so its quality says little: ' +
      idle.map((r) => `${r.attention} (${r.not_exercised})`).join('; ') : '';
  }

  const charts = [];
  function chart(id, config) {
    config.options = Object.assign({ responsive: true, maintainAspectRatio: false, animation: false }, config.options);
    charts.push(new Chart($(id), config));
  }
  const axis = (title, more) => Object.assign({ title: { display: true, text: title, color: css('--soft') }, ticks: { color: css('--soft'), maxTicksLimit: 7 }, grid: { color: css('--line') } }, more);

  // Names beside the points, moved apart where they would cover one another.
  const names = {
    id: 'names',
    afterDatasetsDraw(c) {
      if (!c.options.plugins.names) return;
      const { ctx, chartArea: area } = c;
      const points = c.data.datasets.map((_, i) => c.getDatasetMeta(i).data[0]);
      const placed = points.map((p) => ({ x: p.x - 6, y: p.y, w: 12 }));
      ctx.save();
      ctx.font = '12px system-ui, sans-serif';
      ctx.textBaseline = 'middle';
      c.data.datasets.forEach((set, i) => {
        if (!set.label) return;
        const point = points[i];
        let text = set.label;
        while (text.length > 6 && ctx.measureText(text).width > area.width * 0.55) text = text.slice(0, -2).replace(/…?$/, '…');
        const w = ctx.measureText(text).width, right = point.x + 9 + w < area.right;
        const x = right ? point.x + 9 : Math.max(area.left, point.x - 9 - w);
        let y = point.y;
        for (const step of [0, -14, 14, -28, 28, -42, 42]) {
          y = point.y + step;
          if (y > area.top && y < area.bottom && !placed.some((p) => Math.abs(p.y - y) < 13 && x < p.x + p.w && p.x < x + w)) break;
        }
        placed.push({ x, y, w });
        ctx.fillStyle = set.backgroundColor;
        ctx.fillText(text, x, y);
      });
      ctx.restore();
    },
  };

  // A line without a name joins the rows that no other beats.
  function scatter(id, title, get, show, front) {
    const best = rows.filter((r) => r[front]).map((r) => ({ x: get(r), y: r.ppl })).sort((a, b) => a.x - b.x || b.y - a.y);
    const line = { label: '', data: best, showLine: true, stepped: 'before', borderColor: css('--soft'), borderWidth: 1, pointRadius: 0, pointHitRadius: 0 };
    const points = rows.map((r, i) => ({ label: r.attention, data: [{ x: get(r), y: r.ppl }], backgroundColor: colour(i), pointRadius: 5.5, pointHoverRadius: 7 }));
    chart(id, {
      type: 'scatter',
      data: { datasets: [...points, line] },
      plugins: [names],
      options: {
        layout: { padding: { right: 8 } },
        scales: { x: axis(title, { beginAtZero: true, grace: '6%', ticks: { color: css('--soft'), maxTicksLimit: 6, callback: show } }), y: axis('perplexity', { grace: '12%' }) },
        plugins: { names: true, legend: { display: false }, tooltip: { callbacks: { label: (c) => `${c.dataset.label}: ${show(c.parsed.x)} ${title.split(', ').pop()}, perplexity ${c.parsed.y.toFixed(3)}` } } },
      },
    });
  }

  function losses() {
    const n = rows[0].nll.length, width = Math.max(1, Math.floor(n / 24)), step = Math.max(1, Math.floor(n / 240));
    $('losshint').textContent = `Loss above dense, in nats a token, averaged over ${width} neighbouring tokens; above zero is worse. Positions count from the start of the text.`;
    const sets = rows.slice(1).map((r, i) => {
      const sum = [0];
      r.nll.forEach((x, t) => sum.push(sum[t] + x - rows[0].nll[t]));
      const points = [];
      for (let t = 0; t < n; t += step) {
        const a = Math.max(0, t - (width >> 1)), b = Math.min(n, a + width);
        points.push({ x: data.prompt + t, y: (sum[b] - sum[a]) / (b - a) });
      }
      return { label: r.attention, data: points, borderColor: colour(i + 1), backgroundColor: colour(i + 1), borderWidth: 1.8, pointRadius: 0, tension: 0.25 };
    });
    chart('loss', {
      type: 'line',
      data: { datasets: sets },
      options: {
        interaction: { mode: 'nearest', axis: 'x', intersect: false },
        scales: { x: axis('position in the text', { type: 'linear', min: data.prompt, max: data.prompt + n }), y: axis('loss above dense') },
        plugins: { legend: { position: 'bottom', labels: { color: css('--ink'), boxWidth: 12, boxHeight: 3 } } },
      },
    });
  }

  function times(id, title, key) {
    const parts = ['plan', 'observe', 'select', 'attend', 'products', 'rest'];
    const tones = ['#e69f00', '#cc79a7', '#d55e00', '#0072b2', '#8fa3b8', '#c9d1da'];
    chart(id, {
      type: 'bar',
      data: { labels: rows.map((r) => r.attention.length > 26 ? r.attention.slice(0, 25) + '…' : r.attention), datasets: parts.map((p, i) => ({ label: p, data: rows.map((r) => r[key][p]), backgroundColor: tones[i] })) },
      options: {
        indexAxis: 'y',
        scales: { x: axis('seconds', { stacked: true }), y: axis('', { stacked: true, title: { display: false }, ticks: { color: css('--ink'), font: { size: 11 } }, grid: { display: false } }) },
        plugins: { title: { display: true, text: title, color: css('--ink') }, legend: { position: 'bottom', labels: { color: css('--ink'), boxWidth: 10, boxHeight: 10 } } },
      },
    });
  }

  function paint(canvas, columns, lines, cell, alpha) {
    canvas.width = columns;
    canvas.height = lines * cell;
    const ctx = canvas.getContext('2d'), rgb = css('--map');
    for (let y = 0; y < lines; ++y)
      for (let x = 0; x < columns; ++x) {
        ctx.fillStyle = `rgba(${rgb}, ${alpha(x, y)})`;
        ctx.fillRect(x, y * cell, 1, cell);
      }
  }

  function kept(row) {
    const heads = row.kept.flat(), bins = data.bins, most = Math.max(...heads, 1), strip = 3, lines = heads.length;
    const canvas = el('canvas');
    paint(canvas, bins + strip + 1, lines, Math.max(1, Math.ceil(220 / lines)), (x, y) =>
      x < bins ? level(row.kept_where, y * bins + x) : x === bins ? 0 : heads[y] / most);
    canvas.style.height = Math.min(420, Math.max(160, lines * 5)) + 'px';
    const least = Math.min(...heads), total = heads.reduce((a, b) => a + b, 0);
    const text = `${row.attention}: ${total.toLocaleString('en')} of ${(data.prompt * lines).toLocaleString('en')} entries, ` +
      (least === most ? `${most} in every head` : `${least} to ${most} a head`);
    $('kept').replaceChildren(el('div', { className: 'full' }, el('span', { textContent: text }), canvas,
      el('div', { className: 'axis' }, el('span', { textContent: 'start of the prompt' }), el('span', { textContent: 'its end · entries' }))));
  }

  function plans(row) {
    const draw = (map, title) => {
      const canvas = el('canvas');
      paint(canvas, map.columns, map.rows, 1, (x, y) => Math.sqrt(level(map.share, y * map.columns + x)));
      canvas.style.aspectRatio = '1';
      return el('div', null, canvas, el('span', { textContent: `${title}, layer ${map.layer}, head ${map.head}` }));
    };
    $('plans').replaceChildren(...row.plans.map((m) => draw(m, 'prefill')), ...row.reads.map((m) => draw(m, 'decode')));
  }

  function pick(id, choose, first) {
    const buttons = rows.map((r, i) => el('button', { textContent: r.attention, type: 'button', onclick: () => show(i) }));
    const show = (i) => {
      buttons.forEach((b, j) => b.setAttribute('aria-pressed', String(i === j)));
      choose(rows[i]);
      shown[id] = i;
    };
    $(id).replaceChildren(...buttons);
    show(shown[id] ?? first);
  }
  const shown = {};

  function draw() {
    charts.splice(0).forEach((c) => c.destroy());
    table();
    scatter('memory', 'KV cache, MiB', (r) => r.kv_bytes / 1048576, (x) => String(Number(x.toFixed(x < 10 ? 1 : 0))), 'front_memory');
    scatter('speed', 'seconds', (r) => r.seconds, (x) => String(Number(x.toFixed(x < 10 ? 1 : 0))), 'front_time');
    losses();
    times('prefilltime', 'prefill', 'prefill_seconds');
    times('decodetime', 'decode', 'decode_seconds');
    const evicted = rows.map((r) => r.density_kept < 0.999).lastIndexOf(true);
    const sparse = rows.map((r) => r.density_prefill < 0.999 || r.density_read < 0.999).lastIndexOf(true);
    pick('keptpick', kept, Math.max(0, evicted));
    $('planhint').textContent = 'Queries from top to bottom, keys from left to right; fuller is a larger share of the pairs. “decode” shows which part of the cache each of the scored tokens read.';
    pick('planpick', plans, Math.max(0, sparse));
  }
  draw();
  addEventListener('resize', () => charts.forEach((c) => c.resize()));
  matchMedia('(prefers-color-scheme: dark)').addEventListener('change', draw);
  document.documentElement.dataset.charts = String(charts.length);
})();
